"""MAE ViT-Large/16 on ImageNet-1K, 1600 equivalent epochs the whole time at full size, HOG targets.

Command:  torchrun --nproc_per_node 8 tools/pretrain.py configs/pretrain/mae_large_constant_1600e_hog_imagenet.py
Hardware: written for 8 GPUs; any number that divides 4096 does, accumulation follows. Not run by us: no hours to give
          (tools/plan.py prints the compute).
Expected: no published number of ViT-Large with HOG targets.
Source:   the pixel config with the target of MaskFeat (arXiv 2112.09133); the paper does not print its other settings.
"""

_base_ = "mae_large_constant_1600e_imagenet.py"

model = dict(target="hog")
