"""Demo: UperNet with a small ViT on generated scenes.

Command:  python tools/make_demo_data.py data/demo_ade --layout ade20k --num-train 400 --num-val 60 --image-size 128
          python tools/train.py configs/segmentation/demo.py --backbone work_dirs/demo/etpp/backbone.safetensors \\
              --work-dir work_dirs/segmentation
Hardware: two CPU cores.
Expected: mIoU 22.2 after 400 steps (one seed).
Source:   ours; the backbone is that of configs/pretrain/demo.py. Data: MAE_ET_DEMO_ADE, else data/demo_ade.
"""

_base_ = ["./scene_mini.py"]

data_root = "{{$MAE_ET_DEMO_ADE:data/demo_ade}}"
num_classes = 18
crop_size = (128, 128)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="Resize", scale=crop_size, keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=crop_size, keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(data_root=data_root, num_classes=num_classes, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, num_classes=num_classes, pipeline=test_pipeline))
test_dataloader = val_dataloader
model = dict(
    data_preprocessor=dict(size=crop_size, mean=[127.5] * 3, std=[63.75] * 3),  # as in pre-training
    backbone=dict(img_size=128),
    decode_head=dict(num_classes=num_classes),
    auxiliary_head=dict(num_classes=num_classes),
    test_cfg=dict(_delete_=True, mode="whole"),
)
