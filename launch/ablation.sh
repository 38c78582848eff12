#!/usr/bin/env bash
# Makes the whole ablation table on phantom studies: every row is a run of its own, evaluated in the
# same way on the same held-out subjects.
#   launch/ablation.sh [FOLDER] [ROW ...]     default: runs/ablation, all rows
# Rows share prepared cases, and pseudo-masks where they can. A row that is done is passed over, one
# that was stopped goes on: run the same command again. FOLDER/table.md is written after each row.
set -euo pipefail

here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:-runs/ablation}"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
shift || true
rows=("$@")

# What is chosen by looking at phantoms, such as the threshold candidates of predict/calibrate.py,
# is chosen on those of seed 0. The table is of phantoms that no choice was made on.
# Every CT-1 study has a mask here, for the row that learns from them; the phantom variant's twelve
# evaluation subjects stay the same, and no other row looks at the other masks.
common=(
  --config.data.folder="$folder/studies"
  --config.data.prepared="$folder/prepared"
  --config.phantom.seed=2026
  --config.phantom.num_masked=32
  "--config.data.evaluation_pattern=study_00(2[1-9]|3[0-2])"
)
shared="--config.data.pseudo_masks=$folder/default_0/pseudo_masks"
one_round="--config.train.round_shares=(1.0,)"

row() { # NAME VARIANT [flags]
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

cd "$here/.."
row default_0 phantom
row hu_threshold phantom --stages=prepare,synthesize,evaluate \
  --config.gan.recipe=none --config.network.name=none
row human_0 phantom --stages=prepare,train,evaluate "$shared" \
  --config.train.targets=human "--config.train.rounds=('targets',)" "$one_round"
row direct_0 phantom --stages=prepare,train,evaluate "$shared" \
  "--config.train.rounds=('synthetic',)" "$one_round"
row published_0 phantom_published
row unrefined_0 phantom --stages=prepare,train,evaluate "$shared" \
  "--config.train.rounds=('synthetic','targets')"
row unet_0 phantom --stages=prepare,train,evaluate "$shared" \
  --config.network.name=unet "--config.unet.widths=(8,16,32,64,128)"
row denoiser_0 phantom --config.gan.adversarial_every=0
row two_refinements_0 phantom --stages=prepare,train,evaluate "$shared" \
  "--config.train.rounds=('synthetic','refined','refined')" \
  "--config.train.round_shares=(0.3,0.35,0.35)"
for seed in 1 2; do
  row "default_$seed" phantom --config.seed="$seed"
  row "direct_$seed" phantom --stages=prepare,train,evaluate "$shared" --config.seed="$seed" \
    "--config.train.rounds=('synthetic',)" "$one_round"
  row "published_$seed" phantom_published --config.seed="$seed"
done
cat "$folder/table.md"
