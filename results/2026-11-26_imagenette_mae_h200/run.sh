#!/usr/bin/env bash
# Pre-trains small MAEs on Imagenette at 10 to 40 equivalent epochs, scores and fine-tunes them: `run.sh OUT [SEED]`, on one GPU.
# Stopped runs resume. The recorded runs were 14 at a time on one GPU, in processes of their own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 MAE_ET_IMAGENETTE=${MAE_ET_IMAGENETTE:-data/imagenette}
out=${1:?usage: run.sh OUT [SEED]}
seed=${2:-0}
shards=$out/shards

for split in train val; do
  .venv/bin/python tools/prepare_data.py "$MAE_ET_IMAGENETTE/$split" "$shards/$split" --name $split --encoding raw --sizes 128
done
data=(data.train="$shards/train/train.raw.json" data.val="$shards/val/val.raw.json" data.num_workers=0)

train() { # name, equivalent epochs, warm-up, then options
  local run="$out/mae_$1_$2e_s$seed" epochs=$2 warmup=$3
  shift 3
  [ -e "$run/summary.json" ] && return
  .venv/bin/python tools/pretrain.py imagenette --work-dir "$run" --resume --cfg-options "$@" "${data[@]}" data.loading=fast \
    curriculum.equivalent_epochs="$epochs" curriculum.baseline_equivalent_epochs="$epochs" \
    curriculum.warmup_equivalent_epochs="$warmup" run.seed="$seed" run.num_pictures=0 run.knn_max_images=200
}

finetune() { # the name of a pre-training
  .venv/bin/python tools/classify.py imagenette_finetune --backbone "$out/mae_$1_s$seed/backbone.safetensors" \
    --work-dir "$out/ft_$1_s$seed" --cfg-options "${data[@]}" run.seed="$seed"
}

found=curriculum.file=results/2026-11-26_imagenette_search_1core/mae/curriculum.py
small=(model.embed_dim=384 model.depth=12 model.num_heads=6
  model.decoder_embed_dim=192 model.decoder_depth=4 model.decoder_num_heads=6)
for budget in "10 0.5" "20 1" "40 2"; do
  # shellcheck disable=SC2086
  train constant $budget curriculum.preset=constant
done
train etpp 10 0.5 curriculum.preset=etpp
train etpp 20 1 curriculum.preset=etpp
train found 8 0.4 $found
train found 16 0.8 $found
if [ "$seed" = 0 ]; then
  train small_constant 20 1 curriculum.preset=constant "${small[@]}"
  train small_etpp 10 0.5 curriculum.preset=etpp "${small[@]}"
fi
for run in constant_20e etpp_10e etpp_20e found_8e; do finetune $run; done

.venv/bin/python results/2026-11-26_imagenette_mae_1core/probe.py "$out"/mae_*_s"$seed"/backbone.safetensors \
  --data "$MAE_ET_IMAGENETTE" --out "$out/scores.jsonl"
