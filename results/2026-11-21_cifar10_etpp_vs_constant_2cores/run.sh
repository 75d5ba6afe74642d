#!/usr/bin/env bash
# All runs of this record: two lanes of one thread each. From the repository's root, with MAE_ET_CIFAR10 set:
#   bash results/2026-11-21_cifar10_etpp_vs_constant_2cores/run.sh OUT
set -euo pipefail
out=$1
export OMP_NUM_THREADS=1
common="run.precision=bf16 data.num_workers=0 run.knn_max_images=3000"

pretrain() { # curriculum, equivalent epochs, steps between kNN accuracies, seed
  local dir=$out/$1_$2e_seed$4
  [ -e "$dir/summary.json" ] || python tools/pretrain.py "configs/pretrain/cifar10_$1.py" --work-dir "$dir" --cfg-options \
    $common "curriculum.equivalent_epochs=$2" curriculum.baseline_equivalent_epochs=2.4 \
    curriculum.warmup_equivalent_epochs=0.2 "run.knn_interval=$3" "run.seed=$4"
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
lane "constant 2.4 156 0" "etpp 1.6 199 0" "etpp 2.4 298 1" "constant 2.4 156 2" "etpp 1.6 199 2" "constant 1.6 104 1" &
first=$!
lane "etpp 2.4 298 0" "constant 2.4 156 1" "etpp 1.6 199 1" "etpp 2.4 298 2" "constant 1.6 104 0" "constant 1.6 104 2"
wait $first
