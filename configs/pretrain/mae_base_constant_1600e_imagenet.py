"""MAE ViT-Base/16 on ImageNet-1K, 1600 epochs at full image size.

Other budgets: --cfg-options curriculum.equivalent_epochs=800. HOG targets: --cfg-options model.target=hog.

Command:  torchrun --nproc_per_node 8 tools/pretrain.py configs/pretrain/mae_base_constant_1600e_imagenet.py
Hardware: written for 8 GPUs; any number that divides 4096 works, accumulation follows. Not run by this project, so no
          hours are given; tools/plan.py prints the compute.
Expected: 83.6 (MAE paper, fine-tuned). At 400 epochs: 83.0 (EfficientTrain++ paper). At 1600 with HOG targets: 83.7
          (EfficientTrain++ paper).
Source:   recipe of the MAE paper, in ../_base_/imagenet_mae.py. The micro batch is ours: lower it if memory is short.
"""

_base_ = "../_base_/imagenet_mae.py"

model = dict(size="base")
curriculum = dict(preset="constant", equivalent_epochs=1600)
batch = dict(micro_batch_size=128)
