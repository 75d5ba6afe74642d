"""RetinaNet with Swin-T and FPN on COCO, 1x (12 epochs).

Command:  torchrun --nproc_per_node 8 tools/train.py configs/detection/retinanet_swin_tiny_coco_1x.py --backbone FILE \\
              --launcher pytorch
Hardware: 8 GPUs with 2 images each; the learning rate scales with the batch. Not run by us, so no hours are given.
Expected: 41.7 box AP; from an EfficientTrain backbone 41.8 (EfficientTrain paper).
Source:   the model of mmdetection's retinanet_swin-t-p4-w7_fpn_1x_coco. The paper's optimizer is not known; AdamW is that of Swin's
          other detectors (ours), mmdetection uses SGD.
"""

_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "../_base_/coco_1x_swin.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="TimmFeatures",
        model_name="swin_tiny_patch4_window7_224",
        out_indices=(1, 2, 3),
        out_norm=True,
        model_options=dict(drop_path_rate=0.2),
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
