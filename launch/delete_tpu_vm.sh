#!/usr/bin/env bash
# Deletes a TPU VM that create_tpu_vm.sh made: its queued resource, and with it its node. Of any
# other it says that it is not its own, and leaves it.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu_vm_flags.sh
source "$(dirname "$0")/tpu_vm_flags.sh"

usage() {
  cat <<END
usage: $0 --zone=ZONE [flags]
$common_flags
END
}

take_flags "$@"
if [ "$dry_run" = false ]; then
  description="$(queued describe "$name" --format=yaml)"
  grep -q "${label/=/: }" <<<"$description" ||
    fail "$name in $zone was not made by create_tpu_vm.sh, and is left; name another --name"
fi
queued delete "$name" --force --quiet
