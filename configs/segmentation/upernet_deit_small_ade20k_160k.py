"""UperNet with DeiT-S on ADE20K, 512 px, 160,000 steps.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/segmentation/upernet_deit_small_ade20k_160k.py \\
              --backbone FILE --launcher pytorch
          FILE is any ViT-S/16: a backbone file of supervised training or MAE, or timm's weights of deit_small_patch16_224.
Hardware: 8 GPUs with 2 images each; the learning rate scales with the batch. Not run by us, so
          no hours are given.
Expected: 42.87 mIoU (mmsegmentation's own vit_deit-s16_upernet, single scale); 43.1, and from an EfficientTrain++ backbone
          44.2 (EfficientTrain++ paper).
Source:   mmsegmentation's vit_deit-s16_upernet_8xb2-160k: maps at stride 16, whole images in the test, float32, lr 6e-5, weight
          decay .01, no layer decay. Here biases do not decay. Data: MAE_ET_ADE20K.
"""

_base_ = ["./upernet_vit_base_ade20k_160k.py"]

model = dict(
    backbone=dict(embed_dim=384, num_heads=6, out_indices=(2, 5, 8, 11), rescales=None),
    decode_head=dict(in_channels=[384] * 4, channels=512),
    auxiliary_head=dict(in_channels=384, in_index=3),
    test_cfg=dict(_delete_=True, mode="whole"),
)
optim_wrapper = dict(
    type="OptimWrapper",
    paramwise_cfg=dict(layer_decay=1.0),
    optimizer=dict(lr=6e-5, weight_decay=0.01),
)
