#!/usr/bin/env bash
# Rehearses the default run on a small machine: the published sizes and types, every stage, on 12
# phantom studies that look like MosMedData's, with a handful of training steps.
#   launch/rehearse.sh [FOLDER]     default: runs/rehearsal
# It ends with a table of each step's time and memory, and of what 1,110 studies would take on this
# machine. A step that is done is passed over: run the same command again to go on.
set -euo pipefail

here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:-runs/rehearsal}"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
"$here/local.sh" setup
cd "$here/.."
exec "${VENV:-.venv}/bin/python" -m launch.rehearse "$folder"
