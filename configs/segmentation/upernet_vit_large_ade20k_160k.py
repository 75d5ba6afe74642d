"""UperNet with ViT-L on ADE20K, 512 px, 160,000 steps.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/segmentation/upernet_vit_large_ade20k_160k.py \\
              --backbone FILE --launcher pytorch
Hardware: 8 GPUs with 2 images each, activations recomputed; the learning rate scales with
          the batch. Not run by us, so no hours are given.
Expected: 53.6 mIoU from the official MAE (paper), where learning rate and decay for L are searched for.
Source:   MAE (arXiv 2111.06377); taps after each quarter; layer decay .75 and drop path .2 are those of its fine-tuning
          of L (our choice). Data: MAE_ET_ADE20K.
"""

_base_ = ["./upernet_vit_base_ade20k_160k.py"]

model = dict(
    backbone=dict(
        embed_dim=1024, depth=24, num_heads=16, drop_path_rate=0.2, out_indices=(5, 11, 17, 23),
        activation_checkpointing=True,
    ),
    decode_head=dict(in_channels=[1024] * 4, channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.75))
