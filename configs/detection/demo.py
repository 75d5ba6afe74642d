"""Demo: Mask R-CNN with a small ViTDet on generated scenes of ten classes.

Command:  python tools/make_demo_data.py data/demo_coco --layout coco --num-train 400 --num-val 60 --image-size 128
          python tools/train.py configs/detection/demo.py --backbone work_dirs/demo/etpp/backbone.safetensors \\
              --work-dir work_dirs/detection
Hardware: two CPU cores.
Expected: box AP 13.3 and mask AP 11.6 after 400 steps (one seed).
Source:   ours; the backbone is that of configs/pretrain/demo.py. Data: MAE_ET_DEMO_COCO, else data/demo_coco.
"""

_base_ = ["./coco_mini.py"]

data_root = "{{$MAE_ET_DEMO_COCO:data/demo_coco}}/"
image_size = (128, 128)
classes = ("ball", "box", "cone", "tower", "tree", "star", "ring", "cup", "fish", "flower")
metainfo = dict(classes=classes)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True, poly2mask=True),
    dict(type="Resize", scale=image_size, keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=image_size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[63.75] * 3),  # as in pre-training
    backbone=dict(img_size=128),
    roi_head=dict(bbox_head=dict(num_classes=10), mask_head=dict(num_classes=10)),
)
train_dataloader = dict(
    batch_size=4, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline)
)
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
auto_scale_lr = dict(base_batch_size=4)
max_iters = 400
train_cfg = dict(max_iters=max_iters, val_interval=200)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=max_iters, milestones=[340], gamma=0.1),
]
