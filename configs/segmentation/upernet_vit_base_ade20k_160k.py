"""UperNet with ViT-B on ADE20K, 512 px, 160,000 steps.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/segmentation/upernet_vit_base_ade20k_160k.py \\
              --backbone FILE --launcher pytorch
          python tools/test.py configs/segmentation/upernet_vit_base_ade20k_160k.py CHECKPOINT --tta
Hardware: 8 GPUs with 2 images each; the learning rate scales with the batch. Not run by us, so
          no hours are given.
Expected: 48.1 mIoU from the official MAE (paper). Their backbone also has relative positions and layer scale; ours does not.
Source:   MAE (arXiv 2111.06377) and the configs that come with mmsegmentation. Data: MAE_ET_ADE20K.
"""

_base_ = [
    "../_base_/upernet_vit.py",
    "../_base_/ade20k_512.py",
    "../_base_/upernet_160k.py",
    "../_base_/mmseg_runtime.py",
]
