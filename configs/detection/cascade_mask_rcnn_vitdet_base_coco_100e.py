"""Cascade Mask R-CNN with ViTDet-B on COCO, 100 epochs with large-scale jitter.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/detection/cascade_mask_rcnn_vitdet_base_coco_100e.py \\
              --backbone FILE --launcher pytorch
Hardware: 8 GPUs with 8 images each; the learning rate scales with the batch. Not run by us, so
          no hours are given.
Expected: above Mask R-CNN's 51.6 box AP; the number is in the paper.
Source:   ViTDet (arXiv 2203.16527). Data: MAE_ET_COCO, else data/coco.
"""

_base_ = [
    "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py",
    "../_base_/coco_lsj.py",
    "../_base_/vitdet_schedule.py",
    "../_base_/mmdet_runtime.py",
]

norm_cfg = dict(type="ChannelLayerNorm")
stages = [
    dict(
        type="Shared4Conv1FCBBoxHead",
        in_channels=256,
        conv_out_channels=256,
        fc_out_channels=1024,
        roi_feat_size=7,
        num_classes=80,
        norm_cfg=norm_cfg,
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=stds),
        reg_class_agnostic=True,
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
    )
    for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
]
model = dict(
    backbone=dict(
        _delete_=True, type="ViTDet", img_size=1024, patch_size=16, embed_dim=768, depth=12, num_heads=12,
        drop_path_rate=0.1, window_size=14, global_blocks=(2, 5, 8, 11),
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=768, out_channels=256, num_outs=5),
    rpn_head=dict(num_convs=2),
    roi_head=dict(bbox_head=stages, mask_head=dict(norm_cfg=norm_cfg)),
)
