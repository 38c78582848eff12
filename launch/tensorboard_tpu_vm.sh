#!/usr/bin/env bash
# Shows a run on a TPU VM in TensorBoard here, at http://localhost:6006, through ssh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu_vm_flags.sh
source "$(dirname "$0")/tpu_vm_flags.sh"

workdir=/mnt/covseg/run port=6006 own=(workdir= port=)

usage() {
  cat <<END
usage: $0 --zone=ZONE [flags]
$common_flags
  --workdir=FOLDER   on the VM; default $workdir
  --port=PORT        here; default $port
END
}

take_flags "$@"
tpu_vm ssh "$name" --worker=0 --ssh-flag="-L $port:localhost:6006" \
  --command="covseg_jax/.venv/bin/tensorboard --logdir '$workdir' --port 6006"
