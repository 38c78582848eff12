#!/usr/bin/env bash
# Scores trained models side by side on scans that no training saw, and prints one table.
#   launch/measure.sh FOLDER MODEL [MODEL ...] [flags]
# A MODEL is the work directory of a run, an export, or `default`. With commas, runs/a_0,runs/a_1,
# several of one recipe are one row of the table; with plus signs, runs/a+runs/b, several are
# averaged. FOLDER gets phantoms (made once), table.md and scores.csv. A study that a model has done
# is not done again: run the same command again to go on, and another one to add models. After a
# change of the code delete FOLDER/done.
#   --real_slices=DIR   a data set with lesion masks, such as labelled slices, scored too
#   --healthy=DIR       healthy scans, of which is said how much each model marks in them
#   --phantoms=N        how many phantoms there are, with lesions and as many without (60; 0 makes none)
#   --seed=N            of the phantoms (777001, on which some choices were made; 777003: choose nothing)
#   --num_workers=N     processes beside the network's (one a core, as memory allows; 0 is none)
set -euo pipefail

here="$(cd "$(dirname "$0")" && pwd)"
"$here/local.sh" setup
# Paths are as the caller gives them, whose folder may be another checkout: -P takes no code from it.
python="$(cd "$here/.." && cd "${VENV:-.venv}/bin" && pwd)/python"
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m launch.measure "$@"
