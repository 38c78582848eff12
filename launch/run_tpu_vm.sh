#!/usr/bin/env bash
# Runs the program on all workers of a TPU VM that is set up, and again where it fails. What it did
# before is not done again.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu_vm_flags.sh
source "$(dirname "$0")/tpu_vm_flags.sh"

workdir=/mnt/covseg/run attempts=3 own=(workdir= attempts=)

usage() {
  cat <<END
usage: $0 --zone=ZONE [flags] [-- flags of covseg_jax.main]
$common_flags
  --workdir=FOLDER   default $workdir, on the disk that setup_tpu_vm.sh --share mounts
  --attempts=N       default $attempts
Without flags of its own the program runs --config=configs/transunet.py.
END
}

take_flags "$@"
[[ "$attempts" =~ ^[1-9][0-9]*$ ]] || fail "--attempts=$attempts: must be 1 or more"
if [ "${#program_flags[@]}" -eq 0 ]; then
  program_flags=(--config=configs/transunet.py)
fi
bucket_cache=''
for flag in "${program_flags[@]}"; do
  [[ "$flag" != --bucket_cache=* ]] || bucket_cache="${flag#*=}"
done

# A VM that is shut down sends SIGTERM, after which the program saves, and at once SIGHUP, which
# would end it. A run whose connection was lost may go on: the next one waits for it.
# A run that was asked to stop ends well too, and leaves the file `stopped`; of a bucket's work
# directory in the folder that stands for it on the first worker.
on_workers "trap '' HUP;
exec 9>covseg_jax.lock;
flock -n 9 || { echo waiting for the run before, which has not ended >&2; flock 9; };
cd covseg_jax;
for attempt in \$(seq $attempts); do
.venv/bin/python -m covseg_jax.main$(printf ' %q' "${program_flags[@]}" --workdir="$workdir");
code=\$?;
if [ \$code = 0 ]; then
place=\$(.venv/bin/python -c 'import sys; from covseg_jax import bucket;
sys.argv[2] and bucket.use_cache(sys.argv[2]); print(bucket.local_path(sys.argv[1]))'$(printf ' %q' "$workdir" "$bucket_cache")) && [ ! -e \"\$place/stopped\" ];
exit;
fi;
echo attempt \$attempt of $attempts ended with \$code >&2;
sleep 10;
done;
exit \$code"
