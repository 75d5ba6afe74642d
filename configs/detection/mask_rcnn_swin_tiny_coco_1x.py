"""Mask R-CNN with Swin-T and FPN on COCO, 1x (12 epochs).

Command:  torchrun --nproc_per_node 8 tools/train.py configs/detection/mask_rcnn_swin_tiny_coco_1x.py --backbone FILE \\
              --launcher pytorch
          FILE is a backbone file of timm's swin_tiny_patch4_window7_224; without --backbone: random weights.
Hardware: 8 GPUs with 2 images each; the learning rate scales with the batch. Not run by us, so
          no hours are given.
Expected: 42.7 box AP, 39.3 mask AP (mmdetection's own Swin-T, 1x).
Source:   mmdetection's mask-rcnn_swin-t-p4-w7_fpn_1x_coco, with timm's network, and no decay of biases. Data: MAE_ET_COCO,
          else data/coco.
"""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "../_base_/coco_1x_swin.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="TimmFeatures",
        model_name="swin_tiny_patch4_window7_224",
        out_indices=(0, 1, 2, 3),
        out_norm=True,
        norm_eval=False,
        freeze_at=0,
        model_options=dict(drop_path_rate=0.2),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
