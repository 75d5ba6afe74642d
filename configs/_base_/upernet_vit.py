"""UperNet with an auxiliary FCN head on a plain ViT."""

_base_ = ["mmseg::_base_/models/upernet_mae.py"]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="ViTSeg",
        img_size=512,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        drop_path_rate=0.1,
        out_indices=(3, 5, 7, 11),
        rescales=(4, 2, 1, 0.5),
        norm_cfg=dict(type="SyncBN"),
    ),
    neck=None,  # the backbone rescales its maps itself
    decode_head=dict(in_channels=[768, 768, 768, 768], channels=768, num_classes=150),
    auxiliary_head=dict(in_channels=768, channels=256, num_classes=150),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
tta_model = dict(type="SegTTAModel")
