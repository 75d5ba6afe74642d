"""Fine-tuning an MAE ViT-Large/16 on ImageNet-1K.

Command:  torchrun --nproc_per_node 8 tools/classify.py configs/classification/imagenet_finetune_large.py --backbone FILE
Hardware: written for 8 GPUs; any number that divides 1024 works. Not run by this project, so no hours are given.
Expected: 85.95 top-1 from the official MAE's 1600 epochs (paper; run-to-run deviation of ViT-B about .08).
Source:   MAE paper. The micro batch is ours: lower it if memory is short.
"""

_base_ = ["../_base_/imagenet.py", "../_base_/mae_finetune.py"]

data = dict(augmentation=dict(ramp="randaugment", min_scale=0.08, color_jitter=0.0))
model = dict(size="large", drop_path_rate=0.2)
curriculum = dict(equivalent_epochs=50, baseline_equivalent_epochs=50)
batch = dict(micro_batch_size=64)
optimizer = dict(base_lr=0.001, layer_decay=0.75)
