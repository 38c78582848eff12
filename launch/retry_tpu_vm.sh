#!/usr/bin/env bash
# Runs the program on a preemptible TPU VM until it is done: where the VM was taken away, it is
# deleted, created, set up again, and the run goes on from its last checkpoint.
set -euo pipefail
here="$(dirname "$0")"
# shellcheck source-path=SCRIPTDIR source=tpu_vm_flags.sh
source "$here/tpu_vm_flags.sh"

create=() setup=() run=() failures=3 wait=60

usage() {
  cat <<END
usage: $0 --zone=ZONE [flags] [-- flags of covseg_jax.main]
$common_flags
  --accelerator, --version, --on_demand   as create_tpu_vm.sh takes them
  --share, --data                         as setup_tpu_vm.sh takes them
  --workdir, --attempts                   as run_tpu_vm.sh takes them
  --failures=N       give up after as many runs in a row that fail on a VM that is there; default $failures
  --wait=SECONDS     before the VM is asked for again where none is to be had; default $wait
END
}

take_flag() {
  case "$1" in
    --accelerator=* | --version=* | --on_demand) create+=("$1") ;;
    --share=* | --data=*) setup+=("$1") ;;
    --workdir=* | --attempts=*) run+=("$1") ;;
    --failures=*) failures="${1#*=}" ;;
    --wait=*) wait="${1#*=}" ;;
    *) return 1 ;;
  esac
}

take_flags "$@"
run+=(-- "${program_flags[@]}")
common=(--name="$name" --zone="$zone" ${project:+--project="$project"})
if [ "$dry_run" = true ]; then
  common+=(--dry_run)
fi

# READY, PREEMPTED, ...; nothing where there is no such VM
state() {
  tpu_vm describe "$name" --format='value(state)' 2>/dev/null || true
}

make_vm() {
  local found
  found="$(state)"
  if [ "$found" = READY ]; then
    return 0
  fi
  if [ -n "$found" ]; then
    tpu_vm delete "$name" --quiet || return 1
  fi
  "$here/create_tpu_vm.sh" "${common[@]}" "${create[@]}" || return 1
  "$here/setup_tpu_vm.sh" "${common[@]}" "${setup[@]}"
}

if [ "$dry_run" = true ]; then
  state
  echo '# where it is not READY:'
  tpu_vm delete "$name" --quiet
  "$here/create_tpu_vm.sh" "${common[@]}" "${create[@]}"
  "$here/setup_tpu_vm.sh" "${common[@]}" "${setup[@]}"
  echo '# then, until it ends well:'
  "$here/run_tpu_vm.sh" "${common[@]}" "${run[@]}"
  exit
fi

failed=0
while true; do
  if ! make_vm; then
    echo "no VM $name yet; asking again in $wait seconds" >&2
    sleep "$wait"
    continue
  fi
  if "$here/run_tpu_vm.sh" "${common[@]}" "${run[@]}"; then
    echo "$name: done; delete it: gcloud compute tpus tpu-vm delete $name --zone=$zone"
    exit
  fi
  if [ "$(state)" = READY ]; then
    failed=$((failed + 1))
    if [ "$failed" -ge "$failures" ]; then
      echo "error: the run failed $failed times on a VM that is there; its last lines say why" >&2
      exit 1
    fi
  else
    failed=0
    echo "$name was taken away; making it anew and going on" >&2
  fi
done
