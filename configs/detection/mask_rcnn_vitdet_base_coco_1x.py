"""Mask R-CNN with ViTDet-B on COCO, 1x (12 epochs), batch 16: for a small budget.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/detection/mask_rcnn_vitdet_base_coco_1x.py \\
              --backbone FILE --launcher pytorch
Hardware: 8 GPUs with 2 images each; the learning rate scales with the batch. Not run by us, so
          no hours are given.
Expected: no published number for this budget.
Source:   ours: the recipe of 100 epochs with jitter of 0.8 to 1.25, because there are few epochs, and half the learning rate
          for a quarter of the batch.
"""

_base_ = ["./mask_rcnn_vitdet_base_coco_100e.py"]

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomResize", scale=_base_.image_size, ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(
        type="RandomCrop",
        crop_type="absolute_range",
        crop_size=_base_.image_size,
        recompute_bbox=True,
        allow_negative_crop=True,
    ),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-2, 1e-2)),
    dict(type="Pad", size=_base_.image_size, pad_val=_base_.pad_value),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(batch_size=2, num_workers=4, dataset=dict(pipeline=train_pipeline))
max_iters = 88716
train_cfg = dict(max_iters=max_iters)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=max_iters, milestones=[59144, 81323], gamma=0.1),
]
optim_wrapper = dict(optimizer=dict(lr=5e-5))
auto_scale_lr = dict(base_batch_size=16)
