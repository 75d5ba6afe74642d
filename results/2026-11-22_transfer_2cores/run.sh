# The runs of this record: bash results/2026-11-22_transfer_2cores/run.sh OUT   (from the root of the repository)
set -euo pipefail
out=$(realpath -m "$1") here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
export OMP_NUM_THREADS=1 MAE_ET_DEMO_COCO=$out/coco MAE_ET_DEMO_ADE=$out/ade MAE_ET_SCENES128=$out/scenes128
python tools/make_demo_data.py "$out/scenes128" --layout folder --num-train 6000 --num-val 500 --image-size 128
python tools/make_demo_data.py "$out/coco" --layout coco --num-train 400 --num-val 60 --image-size 128
python tools/make_demo_data.py "$out/ade" --layout ade20k --num-train 400 --num-val 60 --image-size 128
python tools/pretrain.py "$here/config.py" --work-dir "$out/pretrain"
for seed in 0 1 2; do
  for task in detection segmentation; do
    python tools/train.py configs/$task/demo.py --backbone "$out/pretrain/backbone.safetensors" \
      --work-dir "$out/${task}_mae_seed$seed" --cfg-options randomness.seed=$seed
    python tools/train.py configs/$task/demo.py --work-dir "$out/${task}_random_seed$seed" --cfg-options randomness.seed=$seed
  done
done
# coco_few and scene_few: MAE_ET_COCO_MINI and MAE_ET_SCENE_MINI name folders with 8 training photos that are also those for validation
# python tools/train.py configs/detection/coco_mini.py --backbone B --cfg-options train_cfg.max_iters=500 train_cfg.val_interval=125 param_scheduler.1.milestones=[420] param_scheduler.1.end=500
# python tools/train.py configs/segmentation/scene_mini.py --backbone B --cfg-options train_cfg.max_iters=600 train_cfg.val_interval=300 param_scheduler.1.end=600
# coco_mini and scene_mini: all photos
# python tools/train.py configs/detection/coco_mini.py --backbone B --cfg-options train_cfg.max_iters=200 train_cfg.val_interval=200 param_scheduler.1.milestones=[170] param_scheduler.1.end=200
# python tools/train.py configs/segmentation/scene_mini.py --backbone B --cfg-options train_cfg.max_iters=150 train_cfg.val_interval=150 param_scheduler.1.end=150
