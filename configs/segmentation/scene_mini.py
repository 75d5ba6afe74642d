"""UperNet with a tiny ViT on 100 photos with 129 classes, for two CPU cores.

Command:  MAE_ET_SCENE_MINI=/data/scene_mini python tools/train.py configs/segmentation/scene_mini.py --backbone FILE
Hardware: two CPU cores.
Expected: the losses fall. With so few images mIoU shows that code works, not how good a model is.
Source:   ours: narrow heads, 192 px; the backbone is that of configs/pretrain/imagenet_mini.py.
"""

_base_ = [
    "../_base_/upernet_vit.py",
    "../_base_/upernet_160k.py",
    "../_base_/mmseg_runtime.py",
]

custom_imports = dict(imports=["downstream", "downstream.datasets.classes_file"], allow_failed_imports=False)
data_root = "{{$MAE_ET_SCENE_MINI:data/scene_mini}}"
num_classes = 129
crop_size = (192, 192)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(768, 192), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.9),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(768, 192), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale_factor=factor, keep_ratio=True) for factor in (0.5, 0.75, 1.0)],
            [
                dict(type="RandomFlip", prob=0.0, direction="horizontal"),
                dict(type="RandomFlip", prob=1.0, direction="horizontal"),
            ],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="ClassesFileDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        num_classes=num_classes,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="ClassesFileDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        num_classes=num_classes,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        img_size=192,
        patch_size=8,
        embed_dim=128,
        depth=4,
        num_heads=4,
        drop_path_rate=0.0,
        out_indices=(0, 1, 2, 3),
        norm_cfg=dict(type="LN"),
    ),
    decode_head=dict(in_channels=[128] * 4, channels=64, num_classes=num_classes),
    auxiliary_head=dict(in_channels=128, channels=64, num_classes=num_classes),
    test_cfg=dict(mode="slide", crop_size=crop_size, stride=(128, 128)),
)
max_iters = 400
train_cfg = dict(max_iters=max_iters, val_interval=200)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=50, end=max_iters, by_epoch=False),
]
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(lr=5e-4))
auto_scale_lr = dict(enable=True, base_batch_size=4)
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=200), visualization=dict(interval=20)
)
