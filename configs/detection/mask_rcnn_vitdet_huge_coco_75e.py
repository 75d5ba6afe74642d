"""Mask R-CNN with ViTDet-H on COCO, 75 epochs with large-scale jitter; patches of 14 px resampled to 16.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/detection/mask_rcnn_vitdet_huge_coco_75e.py \\
              --backbone FILE --launcher pytorch
Hardware: 8 GPUs with 8 images each, activations recomputed; the learning rate scales with
          the batch. Not run by us, so no hours are given.
Expected: 56.7 box AP, 50.2 mask AP from the official MAE (paper; run-to-run deviation of box AP about .1).
Source:   ViTDet (arXiv 2203.16527); the steps and milestones are three quarters of those of 100 epochs. Data: MAE_ET_COCO.
"""

_base_ = ["./mask_rcnn_vitdet_base_coco_100e.py"]

model = dict(
    backbone=dict(
        embed_dim=1280, depth=32, num_heads=16, drop_path_rate=0.5, global_blocks=(7, 15, 23, 31),
        resample_patches=True, activation_checkpointing=True,
    ),
    neck=dict(in_channels=1280),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.9))
max_iters = 138281
train_cfg = dict(max_iters=max_iters)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=max_iters, milestones=[122917, 133160], gamma=0.1),
]
