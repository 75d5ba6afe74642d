"""Cascade Mask R-CNN with Swin-T on COCO, 1x (12 epochs), several scales.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/detection/cascade_mask_rcnn_swin_tiny_coco_1x.py --backbone FILE \\
              --launcher pytorch
Hardware: 8 GPUs with 2 images each; the learning rate scales with the batch. Not run by us, so no hours are given.
Expected: 48.1 box AP, 41.5 mask AP; from an EfficientTrain++ backbone 48.4 and 41.9 (EfficientTrain++ paper).
Source:   Swin's own cascade_mask_rcnn_swin_tiny_patch4_window7_mstrain_480-800_giou_4conv1f_adamw_1x_coco, with timm's network and
          no decay of biases.
"""

_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py", "../_base_/coco_1x_swin.py"]

# Four convolutions and one linear layer, with GIoU loss on decoded boxes.
stages = [
    dict(
        type="Shared4Conv1FCBBoxHead",
        in_channels=256,
        conv_out_channels=256,
        fc_out_channels=1024,
        roi_feat_size=7,
        num_classes=80,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=stds),
        reg_class_agnostic=False,
        reg_decoded_bbox=True,
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
    )
    for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
]
model = dict(
    backbone=dict(
        _delete_=True,
        type="TimmFeatures",
        model_name="swin_tiny_patch4_window7_224",
        out_indices=(0, 1, 2, 3),
        out_norm=True,
        model_options=dict(drop_path_rate=0.2),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
    roi_head=dict(bbox_head=stages),
)
multi_scale = dict(type="RandomChoiceResize", scales=[(side, 1333) for side in range(480, 801, 32)], keep_ratio=True)
cropped = [
    dict(type="RandomChoiceResize", scales=[(side, 1333) for side in (400, 500, 600)], keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
    multi_scale,
]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomChoice", transforms=[[multi_scale], cropped]),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(type="AmpOptimWrapper")
