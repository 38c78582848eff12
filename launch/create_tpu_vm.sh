#!/usr/bin/env bash
# Creates a Cloud TPU VM, preemptible by default.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu_vm_flags.sh
source "$(dirname "$0")/tpu_vm_flags.sh"

accelerator=v5litepod-8 version=v2-alpha-tpuv5-lite on_demand=false
own=(accelerator= version= on_demand)

usage() {
  cat <<END
usage: $0 --zone=ZONE [flags]
$common_flags
  --accelerator=TYPE default $accelerator
  --version=VERSION  of the runtime; default $version, which is v5e's
  --on_demand        not preemptible, at the full price
END
}

take_flags "$@"
arguments=(--accelerator-type="$accelerator" --version="$version")
if [ "$on_demand" = false ]; then
  arguments+=(--spot)
fi
tpu_vm create "$name" "${arguments[@]}"
