"""Mask R-CNN with ViTDet-B on COCO, 25 epochs with large-scale jitter: a quarter of the published budget.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/detection/mask_rcnn_vitdet_base_coco_25e.py \\
              --backbone FILE --launcher pytorch
Hardware: 8 GPUs with 8 images each; the learning rate scales with the batch. Not run by us, so
          no hours are given.
Expected: less than the 51.6 box AP of 100 epochs; no published number for this budget.
Source:   the recipe of 100 epochs with steps and milestones divided by four (ours).
"""

_base_ = ["./mask_rcnn_vitdet_base_coco_100e.py"]

max_iters = 46094
train_cfg = dict(max_iters=max_iters)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=max_iters, milestones=[40972, 44387], gamma=0.1),
]
