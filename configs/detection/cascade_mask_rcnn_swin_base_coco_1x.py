"""Cascade Mask R-CNN with Swin-B on COCO, 1x (12 epochs), several scales.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/detection/cascade_mask_rcnn_swin_base_coco_1x.py --backbone FILE \\
              --launcher pytorch
Hardware: 8 GPUs with 2 images each; the learning rate scales with the batch. Not run by us, so no hours are given.
Expected: 50.9 box AP, 44.0 mask AP; from an EfficientTrain++ backbone 51.3 and 44.3 (EfficientTrain++ paper).
Source:   the recipe of Swin-T (cascade_mask_rcnn_swin_tiny_coco_1x.py), with the drop path of Swin-B's own 3x config; the
          drop path of the published 1x run is not known.
"""

_base_ = ["./cascade_mask_rcnn_swin_tiny_coco_1x.py"]

model = dict(
    backbone=dict(model_name="swin_base_patch4_window7_224", model_options=dict(drop_path_rate=0.3)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
