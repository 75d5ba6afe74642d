"""UperNet with Swin-B on ADE20K, 512 px, 160,000 steps.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/segmentation/upernet_swin_base_ade20k_160k.py \\
              --backbone FILE --launcher pytorch
Hardware: 8 GPUs with 2 images each; the learning rate scales with the batch. Not run by us, so no hours are given.
Expected: 47.99 mIoU (mmsegmentation's own Swin-B); from an EfficientTrain++ backbone 48.5 (EfficientTrain++ paper).
Source:   mmsegmentation's swin-base-patch4-window7-in1k-pre_upernet_8xb2-160k, in float32. Here biases do not decay. Data:
          MAE_ET_ADE20K.
"""

_base_ = ["./upernet_swin_tiny_ade20k_160k.py"]

model = dict(
    backbone=dict(model_name="swin_base_patch4_window7_224"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
