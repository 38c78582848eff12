#!/usr/bin/env bash
# Asks for a Cloud TPU VM as a queued resource, a spot one by default, and waits until it is there.
# A request that is not granted in time, or that is interrupted, is taken back.
set -euo pipefail
here="$(dirname "$0")"
# shellcheck source-path=SCRIPTDIR source=tpu_vm_flags.sh
source "$here/tpu_vm_flags.sh"

accelerator=v5litepod-8 version='' on_demand=false reserved=false patience=3600 poll=15
own=(accelerator= version= on_demand reserved patience= poll=)

usage() {
  cat <<END
usage: $0 --zone=ZONE [flags]
$common_flags
  --accelerator=TYPE such as v5litepod-8 (v5e), v5p-8, v6e-8, v4-8; default $accelerator
  --version=VERSION  of the runtime; default: what Google's documentation names for the type
  --on_demand        not a spot VM: never taken away, at the full price
  --reserved         of the project's reservation
  --patience=SECONDS to wait for it; default $patience
  --poll=SECONDS     between two looks at the request; default $poll
END
}

# Of https://cloud.google.com/tpu/docs/runtimes, "PyTorch and JAX".
find_version() {
  case "$accelerator" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-* | v3-* | v2-*) echo tpu-ubuntu2204-base ;;
    *) fail "--accelerator=$accelerator: its runtime is not known here; name it with --version" ;;
  esac
}

take_flags "$@"
version="${version:-$(find_version)}"
arguments=(--node-id="$name" --accelerator-type="$accelerator" --runtime-version="$version"
  --labels="$label")
case "$on_demand $reserved" in
  'false false') arguments+=(--spot) ;;
  'false true') arguments+=(--reserved) ;;
  'true true') fail 'take one of --on_demand and --reserved' ;;
esac

if [ "$dry_run" = true ]; then
  queued create "$name" "${arguments[@]}"
  echo "# every $poll seconds, until it is ACTIVE:"
  list_states queued-resources
  echo '# where it is not granted:'
  "$here/delete_tpu_vm.sh" "${same_vm[@]}"
  exit
fi

# From here on, whatever ends this script before the VM is there takes the request back: one that
# is granted later, to nobody, would be paid for.
trap '"$here/delete_tpu_vm.sh" "${same_vm[@]}" >&2' EXIT
trap 'exit 130' INT TERM
queued create "$name" "${arguments[@]}" || {
  trap - EXIT # whatever is there by this name was there before
  exit 1
}
began=$SECONDS said='' said_at=0
while true; do
  waited=$((SECONDS - began))
  state="$(find_state queued-resources || echo unknown)"
  if [ "$state" != "$said" ] || [ $((waited - said_at)) -ge 60 ]; then
    echo "$name in $zone: $state after $waited s" >&2
    said="$state" said_at="$waited"
  fi
  case "$state" in
    ACTIVE) break ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING) exit 1 ;;
  esac
  if [ "$waited" -ge "$patience" ]; then
    echo "$name in $zone: not there after $waited s, the request is taken back" >&2
    exit 1
  fi
  sleep "$poll"
done
trap - EXIT
