"""Mask R-CNN with ViTDet-B on COCO, 100 epochs with large-scale jitter.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/detection/mask_rcnn_vitdet_base_coco_100e.py \\
              --backbone FILE --launcher pytorch
Hardware: 8 GPUs with 8 images each; the learning rate scales with the batch. Not run by us, so
          no hours are given. Where memory is short: model.backbone.activation_checkpointing=True.
Expected: 51.6 box AP, 45.9 mask AP from the official MAE (paper; run-to-run deviation of box AP about .1).
Source:   ViTDet (arXiv 2203.16527). Data: MAE_ET_COCO, else data/coco.
"""

_base_ = [
    "../_base_/mask_rcnn_vitdet.py",
    "../_base_/coco_lsj.py",
    "../_base_/vitdet_schedule.py",
    "../_base_/mmdet_runtime.py",
]
