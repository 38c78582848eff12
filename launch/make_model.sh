#!/usr/bin/env bash
# Makes the model that comes with the code, from phantoms alone: two networks, whose outputs are
# averaged, are trained in FOLDER/seed_0 and FOLDER/seed_1, each on phantoms of its own, exported, and
# put into covseg_jax/default_model/.
#   launch/make_model.sh [FOLDER] [flags]     default: runs/default_model
# The seeds are fixed: the same flags give the same model, on as many cores and with the same code and
# jaxlib. A run that was stopped goes on with the same command. Flags, such as
# --config.train.num_steps=6000, change the recipe or add to it. MODEL_CARD.md stays as it is: write
# there what was measured.
set -euo pipefail
trap 'exit 130' INT TERM # a training that is stopped ends well, and the next would begin

here="$(cd "$(dirname "$0")" && pwd)"
folder=runs/default_model
if [ $# != 0 ] && [[ "$1" != --* ]]; then
  folder="$1"
  shift
fi
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
# Painted healthy scans alone, on a fine grid: whoever changes phantom_fine.py, or what it builds on in
# configs/, may change what this makes.
recipe=(
  --config=configs/transunet.py:phantom_fine
  "--config.export.licence=as this repository's; no patient's data went into it"
)
cd "$here/.."
exports=()
for seed in 0 1; do
  # Each flag once, and --config first: the program takes them in no other way.
  flags=()
  for flag in "${recipe[@]}" "--config.seed=$seed" "--config.phantom.seed=$seed"; do
    for argument in "$@"; do
      if [[ "$argument" == "${flag%%=*}="* ]]; then
        flag="$argument"
      fi
    done
    flags+=("$flag")
  done
  for argument in "$@"; do
    if [[ " ${flags[*]} " != *" $argument "* ]]; then
      flags+=("$argument")
    fi
  done
  run="$folder/seed_$seed"
  flags+=(--workdir="$run")
  "$here/local.sh" run "${flags[@]}" --stages=prepare,train,evaluate
  "$here/local.sh" run "${flags[@]}" --stages=export --output="$run/export"
  exports+=("$run/export")
done
"${VENV:-.venv}/bin/python" -m launch.pack_model "${exports[@]}" covseg_jax/default_model
