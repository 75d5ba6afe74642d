"""Linear probe of an MAE ViT-Large/16 on ImageNet-1K.

Command:  torchrun --nproc_per_node 8 tools/classify.py configs/classification/imagenet_linear_large.py --backbone FILE
Hardware: written for 8 GPUs; any number that divides 16384 works. Not run by this project, so no hours are given.
Expected: 76.0 top-1 from the official MAE's 1600 epochs (paper).
Source:   MAE paper. The micro batch is ours: lower it if memory is short.
"""

_base_ = ["../_base_/imagenet.py", "../_base_/mae_linear.py"]

data = dict(augmentation=dict(ramp="none", min_scale=0.08))
model = dict(pool="token", size="large")
curriculum = dict(equivalent_epochs=50, baseline_equivalent_epochs=50)
batch = dict(micro_batch_size=256)
