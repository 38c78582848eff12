#!/usr/bin/env bash
# Makes the whole ablation table on phantom studies: every row is a run of its own, evaluated in the
# same way on the same held-out subjects.
#   launch/ablation.sh [FOLDER] [ROW ...]     default: runs/ablation, all rows
# Rows share prepared cases, and pseudo-masks where they can. A row that is done is passed over, one
# that was stopped goes on: run the same command again. FOLDER/table.md is written after each row,
# and FOLDER/measured/table.md, of sixty phantoms more, at the end where no row is named.
set -euo pipefail
trap 'exit 130' INT TERM # a training that is stopped ends well, and the next would begin

here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:-runs/ablation}"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
shift || true
rows=("$@")

# What is chosen by looking at phantoms, such as the threshold candidates of predict/calibrate.py,
# is chosen on those of seed 0. The table is of other phantoms, on which only the contrastive loss was
# judged. Every CT-1 study has a mask here, for the row that learns from them; twelve of them are what
# all rows are evaluated on, and no other row looks at the other masks. All rows of one seed hold out
# the same healthy phantoms; seeds differ in which and how many.
common=(
  --config.data.folder="$folder/studies"
  --config.data.prepared="$folder/prepared"
  --config.phantom.seed=2026
  --config.phantom.num_healthy=48
  --config.phantom.num_covid=40
  --config.phantom.num_masked=32
  --config.data.calibration_fraction=0.2
  "--config.data.evaluation_pattern=study_00(49|5[0-9]|60)"
)
shared="--config.data.pseudo_masks=$folder/gan_0/pseudo_masks"

known=()
note_row() { known+=("$1"); }

make_row() { # NAME VARIANT [flags]
  local name="$1" variant="$2"
  shift 2
  if [ "${#rows[@]}" -gt 0 ] && [[ " ${rows[*]} " != *" $name "* ]]; then
    return
  fi
  echo "== $name"
  "$here/local.sh" run --config="configs/transunet.py:$variant" --workdir="$folder/$name" \
    "${common[@]}" "$@"
  "${VENV:-.venv}/bin/python" "$here/ablation_table.py" "$folder" >"$folder/table.md"
}

# The terms of the loss, each added, left out or changed.
terms() { # DO SEED
  local row="$1" seed="--config.seed=$2"
  "$row" "contrastive_$2" phantom "$seed" --config.train.losses.contrastive=0.1
  "$row" "no_mse_$2" phantom "$seed" --config.train.losses.mse=0.0
  "$row" "plain_bce_$2" phantom "$seed" --config.train.losses.beta=0.0
  "$row" "two_phase_$2" phantom "$seed" --config.train.losses.contrastive=0.1 \
    --config.train.mode=two_phase --config.train.epoch_steps=100 --config.train.contrastive_steps=10
}

all_rows() { # DO
  local row="$1"
  "$row" default_0 phantom
  "$row" gan_0 phantom_gan
  "$row" hu_threshold phantom_gan --stages=prepare,synthesize,evaluate \
    --config.gan.recipe=none --config.network.name=none
  "$row" human_0 phantom --config.train.targets=human "--config.train.rounds=('targets',)"
  "$row" published_0 phantom_published
  "$row" unrefined_0 phantom_gan --stages=prepare,train,evaluate "$shared" \
    "--config.train.rounds=('synthetic','targets')"
  "$row" unet_0 phantom --config.network.name=unet "--config.unet.widths=(8,16,32,64,128)"
  "$row" denoiser_0 phantom_gan --config.gan.adversarial_every=0
  "$row" two_refinements_0 phantom_gan --stages=prepare,train,evaluate "$shared" \
    "--config.train.rounds=('synthetic','refined','refined')" \
    "--config.train.round_shares=(0.3,0.35,0.35)"
  terms "$row" 0
  for seed in 1 2; do
    "$row" "default_$seed" phantom --config.seed="$seed"
    "$row" "gan_$seed" phantom_gan --config.seed="$seed"
    "$row" "published_$seed" phantom_published --config.seed="$seed"
    terms "$row" "$seed"
  done
}

all_rows note_row
for name in ${rows[@]+"${rows[@]}"}; do
  if [[ " ${known[*]} " != *" $name "* ]]; then
    echo "error: there is no row $name; rows are ${known[*]}" >&2
    exit 2
  fi
done
cd "$here/.."
all_rows make_row
cat "$folder/table.md"
if [ "${#rows[@]}" -gt 0 ]; then
  exit
fi

# Twelve subjects cannot tell most rows apart: the same networks on sixty phantoms more, with paired
# differences to the first row.
models=()
for first in "$folder"/default_0 "$folder"/*_0; do
  runs=("${first%_0}"_[0-9])
  model="$(IFS=,; echo "${runs[*]}")"
  if [ -e "$first/transunet" ] && [[ " ${models[*]:-} " != *" $model "* ]]; then
    models+=("$model")
  fi
done
"$here/measure.sh" "$folder/measured" "${models[@]}"
