"""Mask R-CNN with ResNet-50 and FPN on COCO, 1x (12 epochs).

Command:  torchrun --nproc_per_node 8 tools/train.py configs/detection/mask_rcnn_resnet50_coco_1x.py --backbone FILE \\
              --launcher pytorch
          FILE is a backbone file of timm's resnet50; without --backbone: random weights.
Hardware: 8 GPUs with 2 images each; the learning rate scales with the batch. Not run by us, so
          no hours are given.
Expected: 38.2 box AP, 34.7 mask AP (mmdetection's own ResNet-50, 1x).
Source:   mmdetection's mask-rcnn_r50_fpn_1x_coco, with timm's network, and no decay of biases and norms. Data: MAE_ET_COCO,
          else data/coco.
"""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "../_base_/coco_1x.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="TimmFeatures",
        model_name="resnet50",
        out_indices=(1, 2, 3, 4),
        out_norm=False,
        norm_eval=True,
        freeze_at=2,
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
