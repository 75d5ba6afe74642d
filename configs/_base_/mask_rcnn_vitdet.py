"""Mask R-CNN on ViTDet: mmdet's model with our backbone and pyramid, two RPN convolutions, LayerNorm in the heads."""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py"]

norm_cfg = dict(type="ChannelLayerNorm")
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(
        _delete_=True,
        type="ViTDet",
        img_size=1024,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        drop_path_rate=0.1,
        window_size=14,
        global_blocks=(2, 5, 8, 11),
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=768, out_channels=256, num_outs=5),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
