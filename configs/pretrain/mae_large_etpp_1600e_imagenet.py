"""MAE ViT-Large/16 on ImageNet-1K, 1600 equivalent epochs under the EfficientTrain++ curriculum.

Command:  torchrun --nproc_per_node 8 tools/pretrain.py configs/pretrain/mae_large_etpp_1600e_imagenet.py
Hardware: written for 8 GPUs; any number that divides 4096 does, accumulation follows. Not run by us: no hours to give
          (tools/plan.py prints the compute).
Expected: no published number with this pixel target.
Source:   recipe of the MAE paper in ../_base_/imagenet_mae.py; micro batch ours, lower it if memory is short.
"""

_base_ = "../_base_/imagenet_mae.py"

model = dict(size="large")
curriculum = dict(preset="etpp", equivalent_epochs=1600)
batch = dict(micro_batch_size=64)
