"""DeiT-Small on ImageNet-1K under EfficientTrain++, 200 equivalent epochs.

Command:  torchrun --nproc_per_node 8 -m mae_et supervised deit_small
          Baseline: add --cfg-options curriculum.preset=constant curriculum.equivalent_epochs=300
          curriculum.warmup_equivalent_epochs=60 model.drop_path_epochs=300
Hardware: written for 8 GPUs of 24 GB; accumulation follows for other numbers. Not run by this project: no hours.
Expected: 81.0 top-1, 80.3 of the baseline; 1.52x faster by compute, 1.60x by wall time (paper).
Source:   released code of EfficientTrain++; ../_base_/imagenet_supervised.py has what all models share.
"""

_base_ = "../_base_/imagenet_supervised.py"

model = dict(name="deit_small_patch16_224", drop_path_rate=0.1)
curriculum = dict(preset="etpp_deit", warmup_equivalent_epochs=40, published_speedup=1.52)
batch = dict(micro_batch_size=256)
optimizer = dict(clip_grad_norm=5.0)
run = dict(precision="fp16")
