"""Mask R-CNN with Swin-B and FPN on COCO, 1x (12 epochs).

Command:  torchrun --nproc_per_node 8 tools/train.py configs/detection/mask_rcnn_swin_base_coco_1x.py --backbone FILE \\
              --launcher pytorch
Hardware: 8 GPUs with 2 images each; the learning rate scales with the batch. Not run by us, so no hours are given.
Expected: no published number for this schedule.
Source:   the recipe of Swin-T (mask_rcnn_swin_tiny_coco_1x.py), with the drop path of Swin-B's own detectors.
"""

_base_ = ["./mask_rcnn_swin_tiny_coco_1x.py"]

model = dict(
    backbone=dict(model_name="swin_base_patch4_window7_224", model_options=dict(drop_path_rate=0.3)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
