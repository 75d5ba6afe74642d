"""UperNet with DeiT-S on ADE20K, 512 px, 160,000 steps.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/segmentation/upernet_deit_small_ade20k_160k.py \\
              --backbone FILE --launcher pytorch
          FILE is any ViT-S/16: ours, or timm's weights of deit_small_patch16_224.
Hardware: written for 8 GPUs with 2 images each; another number of GPUs scales the learning rate with the batch. Not run by
          us: no hours to give.
Expected: 42.87 mIoU (mmsegmentation's own upernet_deit-s16, whose taps and decay differ a little).
Source:   mmsegmentation's upernet_deit-s16: lr 6e-5, weight decay .01, no layer decay. Data: MAE_ET_ADE20K.
"""

_base_ = ["./upernet_vit_base_ade20k_160k.py"]

model = dict(
    backbone=dict(embed_dim=384, num_heads=6),
    decode_head=dict(in_channels=[384] * 4, channels=512),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=1.0), optimizer=dict(lr=6e-5, weight_decay=0.01))
