#!/usr/bin/env bash
# Runs the program on a spot TPU VM until it is done: where the VM is taken away, it is made again,
# in the first of several zones that has one, set up, and the run goes on from its last checkpoint.
# What was made is deleted in the end.
set -euo pipefail
here="$(dirname "$0")"
# shellcheck source-path=SCRIPTDIR source=tpu_vm_flags.sh
source "$here/tpu_vm_flags.sh"

create=() setup=() run=() share='' workdir=/mnt/covseg/run failures=3 wait=60 keep=false
set_up='' # the zone whose VM this launch has set up

usage() {
  cat <<END
usage: $0 --zone=ZONE[,ZONE...] [flags] [-- flags of covseg_jax.main]
$common_flags
  --accelerator, --version, --on_demand, --reserved, --patience, --poll
                     as create_tpu_vm.sh takes them; --patience is for each zone
  --share, --data    as setup_tpu_vm.sh takes them
  --workdir, --attempts
                     as run_tpu_vm.sh takes them
  --failures=N       give up after as many runs in a row that fail on a VM that is there; default $failures
  --wait=SECONDS     before all zones are asked again where none has a VM; default $wait
  --keep             leave the VM in the end; so it is, too, where --workdir is neither on the
                     --share nor in a bucket, for the results would go with it
END
}

take_flag() {
  case "$1" in
    --accelerator=* | --version=* | --on_demand | --reserved | --patience=* | --poll=*)
      create+=("$1")
      ;;
    --share=*) share="${1#*=}" setup+=("$1") ;;
    --data=*) setup+=("$1") ;;
    --workdir=*) workdir="${1#*=}" run+=("$1") ;;
    --attempts=*) run+=("$1") ;;
    --failures=*) failures="${1#*=}" ;;
    --wait=*) wait="${1#*=}" ;;
    --keep) keep=true ;;
    *) return 1 ;;
  esac
}

take_flags "$@"
run+=(-- "${program_flags[@]}")
IFS=, read -r -a zones <<<"$zone"
if [[ "$workdir" != gs://* ]] && { [ -z "$share" ] || [[ "$workdir" != /mnt/covseg/* ]]; }; then
  keep=true
fi

go_to() { # ZONE
  zone="$1"
  find_same_vm
}

# there: it can be used; taken: what is left of it has to go; none: nothing is left. It fails where
# gcloud does not answer.
look() {
  local request node
  request="$(find_state queued-resources)" || return 1
  case "$request" in
    NONE) echo none ;;
    ACTIVE)
      node="$(find_state tpu-vm)" || return 1
      if [ "$node" = READY ]; then echo there; else echo taken; fi
      ;;
    *) echo taken ;;
  esac
}

# Once in each launch: an earlier one may have ended before.
set_vm_up() {
  [ "$set_up" = "$zone" ] || "$here/setup_tpu_vm.sh" "${same_vm[@]}" "${setup[@]}" || return 1
  set_up="$zone"
}

make_vm() {
  local each found
  for each in "${zones[@]}"; do # before any is asked for: there must never be two
    go_to "$each"
    found="$(look)" || return 1
    case "$found" in
      there) return 0 ;;
      taken) "$here/delete_tpu_vm.sh" "${same_vm[@]}" || return 1 ;;
    esac
  done
  for each in "${zones[@]}"; do
    go_to "$each"
    if "$here/create_tpu_vm.sh" "${same_vm[@]}" "${create[@]}"; then
      return 0
    fi
  done
  return 1
}

end() { # MESSAGE CODE
  echo "$1"
  if [ "$keep" = false ]; then
    "$here/delete_tpu_vm.sh" "${same_vm[@]}"
  else
    echo "$name in $zone is still there and costs; fetch what you need (fetch_results.sh), then:" \
      "$here/delete_tpu_vm.sh ${same_vm[*]}"
  fi
  exit "$2"
}

if [ "$dry_run" = true ]; then
  for each in "${zones[@]}"; do
    go_to "$each"
    list_states queued-resources
    list_states tpu-vm
    echo '# where it is not there, in this zone or the next:'
    "$here/create_tpu_vm.sh" "${same_vm[@]}" "${create[@]}"
    "$here/setup_tpu_vm.sh" "${same_vm[@]}" "${setup[@]}"
    echo '# then, until it ends well:'
    "$here/run_tpu_vm.sh" "${same_vm[@]}" "${run[@]}"
  done
  [ "$keep" = true ] || "$here/delete_tpu_vm.sh" "${same_vm[@]}"
  exit
fi

trap 'echo "$name may still be there and cost: $here/delete_tpu_vm.sh ${same_vm[*]}" >&2; exit 130' \
  INT TERM
failed=0
while true; do
  if ! make_vm; then
    echo "no VM $name yet; asking again in $wait seconds" >&2
    sleep "$wait"
    continue
  fi
  if set_vm_up && "$here/run_tpu_vm.sh" "${same_vm[@]}" "${run[@]}"; then
    end "$name: done" 0
  fi
  found="$(look || echo unknown)"
  case "$found" in
    there)
      failed=$((failed + 1))
      if [ "$failed" -ge "$failures" ]; then
        echo "error: the run, or setting up for it, failed $failed times on a VM that is there;" \
          'its last lines say why' >&2
        end "$name: given up" 1
      fi
      ;;
    unknown)
      echo "gcloud does not answer; asking again in $wait seconds" >&2
      sleep "$wait"
      ;;
    *)
      failed=0 set_up=''
      echo "$name was taken away; making it anew and going on" >&2
      ;;
  esac
done
