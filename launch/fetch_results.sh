#!/usr/bin/env bash
# Copies a run's results from a TPU VM: everything but checkpoints, studies, prepared cases and what
# XLA compiled; with --checkpoints the checkpoints too.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu_vm_flags.sh
source "$(dirname "$0")/tpu_vm_flags.sh"

workdir=/mnt/covseg/run output=results left_out=(prepared studies compile_cache checkpoints)

usage() {
  cat <<END
usage: $0 --zone=ZONE [flags]
$common_flags
  --workdir=FOLDER   on the VM; default $workdir
  --output=FOLDER    here; default $output
  --checkpoints      checkpoints too
END
}

take_flag() {
  case "$1" in
    --workdir=*) workdir="${1#*=}" ;;
    --output=*) output="${1#*=}" ;;
    --checkpoints) left_out=(prepared studies compile_cache) ;;
    *) return 1 ;;
  esac
}

take_flags "$@"
archive=covseg_results.tar.gz
tpu_vm ssh "$name" --worker=0 \
  --command="tar -C '$workdir' -czf $archive$(printf ' --exclude=%q' "${left_out[@]}") ."
call mkdir -p "$output"
tpu_vm scp "$name:$archive" "$output/" --worker=0
call tar -C "$output" -xzf "$output/$archive"
call rm "$output/$archive"
