"""UperNet with Swin-T on ADE20K, 512 px, 160,000 steps.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/segmentation/upernet_swin_tiny_ade20k_160k.py \\
              --backbone FILE --launcher pytorch
          FILE is a backbone file of timm's swin_tiny_patch4_window7_224; without --backbone: random weights.
Hardware: 8 GPUs with 2 images each; the learning rate scales with the batch. Not run by us, so
          no hours are given.
Expected: 44.41 mIoU (mmsegmentation's own Swin-T); from an EfficientTrain++ backbone 44.8 (EfficientTrain++ paper).
Source:   mmsegmentation's swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k, in float32. Here biases do not decay. Data: MAE_ET_ADE20K.
"""

_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "../_base_/ade20k_512.py",
    "../_base_/upernet_160k.py",
    "../_base_/mmseg_runtime.py",
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="TimmFeatures",
        model_name="swin_tiny_patch4_window7_224",
        out_indices=(0, 1, 2, 3),
        out_norm=True,
        model_options=dict(drop_path_rate=0.3),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=150),
    auxiliary_head=dict(in_channels=384, num_classes=150),
)
tta_model = dict(type="SegTTAModel")
optim_wrapper = dict(
    type="OptimWrapper",  # float32, as there
    paramwise_cfg=dict(_delete_=True, no_decay=("relative_position_bias_table",)),
    optimizer=dict(lr=6e-5, weight_decay=0.01),
)
