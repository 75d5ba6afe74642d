"""DeiT-Tiny on ImageNet-1K under EfficientTrain++, 200 equivalent epochs.

Command:  torchrun --nproc_per_node 8 -m mae_et supervised deit_tiny
          Baseline: add --cfg-options curriculum.preset=constant curriculum.equivalent_epochs=300
          curriculum.warmup_equivalent_epochs=60 model.drop_path_epochs=300
Hardware: written for 8 GPUs of 24 GB; accumulation follows for other numbers. Not run by this project: no hours.
Expected: 73.7 top-1, 72.5 of the baseline; 1.56x faster by compute, 1.64x by wall time (paper).
Source:   released code of EfficientTrain++ for DeiT-S; drop path of DeiT-T from that of EfficientTrain (arXiv 2211.09703).
          ../_base_/imagenet_supervised.py has what all models share.
"""

_base_ = "../_base_/imagenet_supervised.py"

model = dict(name="deit_tiny_patch16_224", drop_path_rate=0.1)
curriculum = dict(preset="etpp_deit", warmup_equivalent_epochs=40, published_speedup=1.56)
batch = dict(micro_batch_size=256)
optimizer = dict(clip_grad_norm=5.0)
run = dict(precision="fp16")
