"""MAE ViT-Large/16 on ImageNet-1K, 400 equivalent epochs under the EfficientTrain++ curriculum.

Other budgets: --cfg-options curriculum.equivalent_epochs=800. HOG targets: --cfg-options model.target=hog.

Command:  torchrun --nproc_per_node 8 tools/pretrain.py configs/pretrain/mae_large_etpp_400e_imagenet.py
Hardware: written for 8 GPUs; any number that divides 4096 works, accumulation follows. Not run by this project, so no
          hours are given; tools/plan.py prints the compute.
Expected: no published number with pixel targets.
Source:   recipe of the MAE paper, in ../_base_/imagenet_mae.py. The micro batch is ours: lower it if memory is short.
"""

_base_ = "../_base_/imagenet_mae.py"

model = dict(size="large")
curriculum = dict(preset="etpp", equivalent_epochs=400)
batch = dict(micro_batch_size=64)
