#!/usr/bin/env bash
# All runs of this record: two lanes of one thread each. From the repository's root, with MAE_ET_CIFAR10 set:
#   bash results/2026-11-21_cifar10_etpp_vs_constant_2cores/run.sh OUT
set -euo pipefail
out=$1
export OMP_NUM_THREADS=1
common="run.precision=bf16 data.num_workers=0 optimizer.base_lr=2e-3"

pretrain() { # curriculum, equivalent epochs, steps between kNN accuracies, seed
  local dir=$out/$1_$2e_seed$4
  [ -e "$dir/summary.json" ] || python tools/pretrain.py "configs/pretrain/cifar10_$1.py" --work-dir "$dir" --cfg-options \
    $common "curriculum.equivalent_epochs=$2" curriculum.baseline_equivalent_epochs=3.6 \
    curriculum.warmup_equivalent_epochs=0.3 "run.knn_interval=$3" "run.seed=$4"
}
probe() { # the same names
  local backbone=$out/$1_$2e_seed$4/backbone.safetensors
  for protocol in knn linear; do
    local dir=$out/$1_$2e_seed$4_$protocol
    [ -e "$dir/summary.json" ] || python tools/classify.py "configs/classification/cifar10_$protocol.py" \
      --backbone "$backbone" --work-dir "$dir" --cfg-options run.precision=bf16 data.num_workers=0 "run.seed=$4"
  done
}
lane() {
  for job in "$@"; do
    read -r curriculum epochs interval seed <<<"$job"
    pretrain "$curriculum" "$epochs" "$interval" "$seed"
    probe "$curriculum" "$epochs" "$interval" "$seed"
  done
}
lane "constant 3.6 176 0" "etpp 2.4 224 0" "etpp 3.6 336 1" "constant 3.6 176 2" "etpp 2.4 224 2" "constant 2.4 117 1" &
first=$!
lane "etpp 3.6 336 0" "constant 3.6 176 1" "etpp 2.4 224 1" "etpp 3.6 336 2" "constant 2.4 117 0" "constant 2.4 117 2"
wait $first
