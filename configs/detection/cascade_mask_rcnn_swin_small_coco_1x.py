"""Cascade Mask R-CNN with Swin-S on COCO, 1x (12 epochs), several scales.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/detection/cascade_mask_rcnn_swin_small_coco_1x.py --backbone FILE \\
              --launcher pytorch
Hardware: 8 GPUs with 2 images each; the learning rate scales with the batch. Not run by us, so no hours are given.
Expected: 50.0 box AP, 43.1 mask AP; from an EfficientTrain++ backbone 50.7 and 43.7 (EfficientTrain++ paper).
Source:   the recipe of Swin-T (cascade_mask_rcnn_swin_tiny_coco_1x.py), with the drop path of Swin-S's own 3x config; the
          drop path of the published 1x run is not known.
"""

_base_ = ["./cascade_mask_rcnn_swin_tiny_coco_1x.py"]

model = dict(
    backbone=dict(model_name="swin_small_patch4_window7_224", model_options=dict(drop_path_rate=0.2)),
)
