#!/usr/bin/env bash
# Sets every worker of a TPU VM up: Python >= 3.11, this checkout's last commit, its requirements with
# jax[tpu], a disk that all workers share, and the data.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu_vm_flags.sh
source "$(dirname "$0")/tpu_vm_flags.sh"

share='' data='' own=(share= data=)

usage() {
  cat <<END
usage: $0 --zone=ZONE [flags]
$common_flags
  --share=HOST:/PATH an NFS export (Filestore) that becomes /mnt/covseg on every worker: work
                     directories there outlive the VM, and several workers need it
  --data=gs://FOLDER a data set's folder in Cloud Storage, copied to data/MosMedData
END
}

take_flags "$@"
cd "$(dirname "$0")/.."
archive="$(mktemp --suffix=.tar.gz)"
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
tpu_vm scp "$archive" "$name:covseg_jax.tar.gz" --worker=all

# The images have Python 3.10.
on_workers 'set -e;
command -v python3.11 >/dev/null || {
sudo add-apt-repository -y ppa:deadsnakes/ppa;
sudo apt-get update -q;
sudo apt-get install -y -q python3.11 python3.11-venv;
};
mkdir -p covseg_jax;
tar -xzf covseg_jax.tar.gz -C covseg_jax;
cd covseg_jax;
python3.11 -m venv .venv;
sed "s/^jax==/jax[tpu]==/" requirements.txt > requirements_tpu.txt;
.venv/bin/python -m pip install -q -r requirements_tpu.txt'
if [ -n "$share" ]; then
  on_workers "set -e;
sudo apt-get install -y -q nfs-common;
sudo mkdir -p /mnt/covseg;
mountpoint -q /mnt/covseg || sudo mount -t nfs '$share' /mnt/covseg;
sudo chmod a+rwx /mnt/covseg"
fi
if [ -n "$data" ]; then
  on_workers "mkdir -p covseg_jax/data/MosMedData &&
gcloud storage rsync --recursive '$data' covseg_jax/data/MosMedData"
fi
