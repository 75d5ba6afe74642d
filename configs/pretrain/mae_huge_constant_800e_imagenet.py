"""MAE ViT-Huge/14 on ImageNet-1K, 800 equivalent epochs the whole time at full size.

Command:  torchrun --nproc_per_node 8 tools/pretrain.py configs/pretrain/mae_huge_constant_800e_imagenet.py
Hardware: written for 8 GPUs; any number that divides 4096 does, accumulation follows. Not run by us: no hours to give
          (tools/plan.py prints the compute).
Expected: no published number for this budget.
Source:   recipe of the MAE paper in ../_base_/imagenet_mae.py; micro batch ours, lower it if memory is short.
"""

_base_ = "../_base_/imagenet_mae.py"

model = dict(size="huge")
curriculum = dict(preset="constant", equivalent_epochs=800)
batch = dict(micro_batch_size=32)
