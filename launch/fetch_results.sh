#!/usr/bin/env bash
# Copies a run's results from a TPU VM: everything but checkpoints, studies, prepared cases and what
# XLA compiled; with --checkpoints the checkpoints too.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu_vm_flags.sh
source "$(dirname "$0")/tpu_vm_flags.sh"

workdir=/mnt/covseg/run output=results checkpoints=false
own=(workdir= output= checkpoints)

usage() {
  cat <<END
usage: $0 --zone=ZONE [flags]
$common_flags
  --workdir=FOLDER   on the VM; default $workdir
  --output=FOLDER    here; default $output
  --checkpoints      checkpoints too
END
}

take_flags "$@"
left_out=(prepared studies compile_cache)
if [ "$checkpoints" = false ]; then
  left_out+=(checkpoints)
fi
archive=covseg_results.tar.gz
tpu_vm ssh "$name" --worker=0 \
  --command="tar -C '$workdir' -czf $archive$(printf ' --exclude=%q' "${left_out[@]}") ."
call mkdir -p "$output"
tpu_vm scp "$name:$archive" "$output/" --worker=0
call tar -C "$output" -xzf "$output/$archive"
call rm "$output/$archive"
