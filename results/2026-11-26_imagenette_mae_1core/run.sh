#!/usr/bin/env bash
# Pre-trains the small MAE with and without the curriculum at several budgets, one run after the other on one core, and scores
# the backbones. Stopped runs resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 MAE_ET_IMAGENETTE=${MAE_ET_IMAGENETTE:-data/imagenette}
out=${1:?usage: run.sh OUT [SEED]}
seed=${2:-0}

train() { # name, equivalent epochs, warm-up, options
  local run="$out/mae_$1_$2e_s$seed"
  [ -e "$run/summary.json" ] && return
  taskset -c 0 .venv/bin/python tools/pretrain.py imagenette --work-dir "$run" --resume --cfg-options \
    "${@:4}" curriculum.equivalent_epochs="$2" curriculum.warmup_equivalent_epochs="$3" run.seed="$seed"
}

for preset in etpp constant; do
  train $preset 10 0.5 curriculum.preset=$preset
  train $preset 5 0.25 curriculum.preset=$preset
  train $preset 2.5 0.125 curriculum.preset=$preset
done
train found 5 0.25 curriculum.file=results/2026-11-26_imagenette_search_1core/mae/curriculum.py

if [ "$seed" = 0 ]; then
  train hog_constant 5 0.25 curriculum.preset=constant model.target=hog
  train hog_etpp 5 0.25 curriculum.preset=etpp model.target=hog
  train hog_etpp 2.5 0.125 curriculum.preset=etpp model.target=hog
  train cls4 5 0.25 curriculum.preset=etpp model.num_cls_tokens=4
  train squares2 5 0.25 curriculum.preset=etpp model.mask_grid=2
  for change in "bicubic --resize bicubic" "mask50 --first-mask-ratio 0.5"; do
    read -r name option value <<<"$change"
    taskset -c 0 .venv/bin/python results/2026-11-26_imagenette_mae_1core/variant.py imagenette "$option" "$value" \
      --work-dir "$out/mae_${name}_5e_s0" --resume --cfg-options curriculum.preset=etpp curriculum.equivalent_epochs=5 \
      curriculum.warmup_equivalent_epochs=0.25 run.seed=0
  done
fi

taskset -c 0 .venv/bin/python results/2026-11-26_imagenette_mae_1core/probe.py "$out"/mae_*_s"$seed"/backbone.safetensors \
  --data "$MAE_ET_IMAGENETTE" --out "$out/scores.jsonl"
