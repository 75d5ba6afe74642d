"""Mask R-CNN with a tiny ViTDet on 98 images of COCO, for two CPU cores.

Command:  MAE_ET_COCO_MINI=/data/coco_mini python tools/train.py configs/detection/coco_mini.py --backbone FILE
Hardware: two CPU cores.
Expected: all losses fall. With so few images AP shows that code works, not how good a model is.
Source:   ours: small heads and few proposals, 256 px, patches and strides of half the usual side; the backbone is that of configs/pretrain/imagenet_mini.py.
"""

_base_ = [
    "../_base_/mask_rcnn_vitdet.py",
    "../_base_/coco_lsj.py",
    "../_base_/vitdet_schedule.py",
    "../_base_/mmdet_runtime.py",
]

data_root = "{{$MAE_ET_COCO_MINI:data/coco_mini}}/"
image_size = (256, 256)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomResize", scale=image_size, ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(
        type="RandomCrop",
        crop_type="absolute_range",
        crop_size=image_size,
        recompute_bbox=True,
        allow_negative_crop=True,
    ),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1)),
    dict(type="Pad", size=image_size, pad_val=_base_.pad_value),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=image_size, keep_ratio=True),
    dict(type="Pad", size=image_size, pad_val=_base_.pad_value),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
model = dict(
    backbone=dict(
        img_size=256,
        patch_size=8,
        embed_dim=128,
        depth=4,
        num_heads=4,
        drop_path_rate=0.0,
        window_size=8,
        global_blocks=(1, 3),
    ),
    neck=dict(in_channels=128, out_channels=64),
    rpn_head=dict(
        in_channels=64, feat_channels=64, num_convs=1, anchor_generator=dict(strides=[2, 4, 8, 16, 32])
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, featmap_strides=[2, 4, 8, 16], finest_scale=28),
        bbox_head=dict(type="Shared2FCBBoxHead", in_channels=64, conv_out_channels=64, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=64, featmap_strides=[2, 4, 8, 16], finest_scale=28),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_convs=2),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root, pipeline=test_pipeline)
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

max_iters = 600
train_cfg = dict(max_iters=max_iters, val_interval=300)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=max_iters, milestones=[500], gamma=0.1),
]
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(base_batch_size=2)
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=300), visualization=dict(interval=20)
)
