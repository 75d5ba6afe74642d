#!/usr/bin/env bash
# Trains each network with and without the curriculum at two budgets, one after the other on one core. Stopped runs resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 MAE_ET_IMAGENETTE=${MAE_ET_IMAGENETTE:-data/imagenette}
out=${1:?usage: run.sh OUT [SEED]}
seed=${2:-0}

train() { # network, preset, equivalent epochs, warm-up, steps between evaluations (a fifth of the run)
  local run="$out/$1_$2_$3e_s$seed"
  [ -e "$run/summary.json" ] && return
  taskset -c 0 .venv/bin/python tools/supervised.py "configs/supervised/imagenette_$1.py" --work-dir "$run" --resume --cfg-options \
    curriculum.preset="$2" curriculum.equivalent_epochs="$3" curriculum.warmup_equivalent_epochs="$4" run.seed="$seed" eval_interval="$5"
}

for network in resnet vit convnext; do
  train $network etpp 8 0.4 538
  train $network constant 8 0.4 236
  train $network etpp 5.33 0.2665 358
  train $network constant 5.33 0.2665 157
done
