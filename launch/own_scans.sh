#!/usr/bin/env bash
# Trains the model that comes with the code on, with scans of yours without masks: both its networks,
# in two rounds; in the second those of the first make the pseudo-masks (docs/own_scans.md).
#   launch/own_scans.sh DATA [FOLDER] [flags]     default: runs/own_scans
# DATA is a data set with healthy scans and scans with COVID-19, at least two of each. FOLDER gets a
# run of each network and round. A training that was stopped goes on with the same command. Flags,
# such as --config.seed=1, are added to the recipe.
set -euo pipefail
trap 'exit 130' INT TERM # a training that is stopped ends well, and the next would begin

here="$(cd "$(dirname "$0")" && pwd)"
if [ $# = 0 ] || [[ "$1" == --* ]]; then
  echo "usage: $0 DATA [FOLDER] [flags]" >&2
  exit 2
fi
if [ ! -d "$1" ]; then
  echo "error: $1: is not a folder; name one with studies/, as docs/data.md describes" >&2
  exit 2
fi
data="$(cd "$1" && pwd)"
shift
folder=runs/own_scans
if [ $# != 0 ] && [[ "$1" != --* ]]; then
  folder="$1"
  shift
fi
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
flags=(
  --config.data.folder="$data"
  --config.phantom.make=false
  --config.synthesize.source=model
  --config.train.statistics=scans
  --config.train.num_steps=1200
  --config.train.learning_rate=5e-4
  "--config.train.rounds=('targets',)"
  "--stages=prepare,synthesize,train,export"
  "$@"
)

train() { # NETWORK ROUND VARIANT INIT
  local run="$folder/$1_$2"
  echo "== $1 network, round $2"
  "$here/local.sh" run --config="configs/transunet.py:$3" --workdir="$run" --output="$run/export" \
    --config.data.prepared="$folder/prepared_$1" --config.train.init="$4" "${flags[@]}"
}

cd "$here/.."
train fine 1 phantom_fine default
train coarse 1 phantom covseg_jax/default_model/network_1
train fine 2 phantom_fine "$folder/fine_1/export,$folder/coarse_1/export"
train coarse 2 phantom "$folder/coarse_1/export"
echo "This marks scans with both networks:"
echo "python -m covseg_jax.main --model=$folder/fine_2/export,$folder/coarse_2/export" \
  "--input=SCANS --output=MASKS"
