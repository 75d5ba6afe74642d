"""Mask R-CNN with ViTDet-L on COCO, 100 epochs with large-scale jitter.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/detection/mask_rcnn_vitdet_large_coco_100e.py \\
              --backbone FILE --launcher pytorch
Hardware: 8 GPUs with 8 images each, activations recomputed; the learning rate scales with
          the batch. Not run by us, so no hours are given.
Expected: 55.5 box AP, 49.2 mask AP from the official MAE (paper; run-to-run deviation of box AP about .1).
Source:   ViTDet (arXiv 2203.16527). Data: MAE_ET_COCO, else data/coco.
"""

_base_ = ["./mask_rcnn_vitdet_base_coco_100e.py"]

model = dict(
    backbone=dict(
        embed_dim=1024, depth=24, num_heads=16, drop_path_rate=0.4, global_blocks=(5, 11, 17, 23), activation_checkpointing=True
    ),
    neck=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.8))
