"""MAE ViT-Base/16 on ImageNet-1K, 400 equivalent epochs under the EfficientTrain++ curriculum, HOG targets.

Command:  torchrun --nproc_per_node 8 tools/pretrain.py configs/pretrain/mae_base_etpp_400e_hog_imagenet.py
Hardware: written for 8 GPUs; any number that divides 4096 works, accumulation follows. Not run by this project, so no
          hours are given; tools/plan.py prints the compute.
Expected: 83.7 (EfficientTrain++ paper, fine-tuned), 3.98 times as fast as 1600 epochs at full size.
Source:   the config with pixel targets, with the target of MaskFeat (arXiv 2112.09133). The EfficientTrain++ paper does not
          print its other settings.
"""

_base_ = "./mae_base_etpp_400e_imagenet.py"

model = dict(target="hog")
