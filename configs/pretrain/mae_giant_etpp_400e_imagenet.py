"""MAE ViT-g/14 (1.1 B parameters) on ImageNet-1K, 400 equivalent epochs under the EfficientTrain++ curriculum, with FSDP2.

Command:  torchrun --nproc_per_node 8 tools/pretrain.py configs/pretrain/mae_giant_etpp_400e_imagenet.py
          On several machines: tools/pretrain.sbatch, see docs/guides/many_gpus.md.
Hardware: written for 8 GPUs or more; any number that divides 4096 works, accumulation follows. Not run by this project, so no
          hours are given; tools/plan.py prints the compute.
Expected: no published number with this recipe.
Source:   recipe of the MAE paper, in ../_base_/imagenet_mae.py. The size is DINOv2's ViT-g/14 with plain MLPs. The micro batch, sharding and
          gradients in bf16 are ours: lower the micro batch if memory is short.
"""

_base_ = "../_base_/imagenet_mae.py"

model = dict(size="giant")
curriculum = dict(preset="etpp", equivalent_epochs=400)
batch = dict(micro_batch_size=32)
run = dict(parallel="fsdp", gradient_dtype="bf16", activation_checkpointing=True)
