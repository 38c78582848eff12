#!/usr/bin/env bash
# Makes the model that comes with the code, from phantoms alone: two networks, whose outputs are
# averaged, one on a fine grid and one on a coarse one. They are trained in FOLDER/fine and
# FOLDER/coarse, exported, and put into covseg_jax/default_model/.
#   launch/make_model.sh [FOLDER] [flags]     default: runs/default_model
# The seeds are fixed: the same flags give the same model, on as many cores and with the same code and
# jaxlib. A run that was stopped goes on with the same command. Flags, such as
# --config.train.num_steps=6000, change both recipes or add to them. MODEL_CARD.md stays as it is: write
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
# Painted healthy scans alone: whoever changes phantom.py or phantom_fine.py, or what they build on in
# configs/, may change what this makes.
fine=(--config=configs/transunet.py:phantom_fine)
coarse=(
  --config=configs/transunet.py:phantom
  --config.phantom.num_healthy=160
  --config.data.calibration_fraction=0.1
  --config.train.num_steps=12000
  --config.train.ema_decay=0.99
  --config.train.evaluate_every=1000
)
both=(
  --config.seed=0
  --config.phantom.seed=0
  "--config.export.licence=as this repository's; no patient's data went into it"
)

given=("$@") # expanded as below, because bash 3.2 takes an empty array for an unset one

# NAME RECIPE... Each flag once, and --config first: the program takes them in no other way.
train() {
  local run="$folder/$1" flags=() flag argument
  shift
  for flag in "$@" "${both[@]}"; do
    for argument in ${given[@]+"${given[@]}"}; do
      if [[ "$argument" == "${flag%%=*}="* ]]; then
        flag="$argument"
      fi
    done
    flags+=("$flag")
  done
  for argument in ${given[@]+"${given[@]}"}; do
    if [[ " ${flags[*]} " != *" $argument "* ]]; then
      flags+=("$argument")
    fi
  done
  flags+=(--workdir="$run")
  "$here/local.sh" run "${flags[@]}" --stages=prepare,train,evaluate
  "$here/local.sh" run "${flags[@]}" --stages=export --output="$run/export"
}

cd "$here/.."
train fine "${fine[@]}"
train coarse "${coarse[@]}"
"${VENV:-.venv}/bin/python" -m launch.pack_model "$folder"/{fine,coarse}/export covseg_jax/default_model
