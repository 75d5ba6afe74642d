"""Swin-Tiny on ImageNet-1K under EfficientTrain++, 200 equivalent epochs.

Command:  torchrun --nproc_per_node 8 -m mae_et supervised swin_tiny
          Baseline: add --cfg-options curriculum.preset=constant curriculum.equivalent_epochs=300
          curriculum.warmup_equivalent_epochs=20 model.drop_path_epochs=300
Hardware: written for 8 GPUs of 24 GB; accumulation follows for other numbers. Not run by this project: no hours.
Expected: 81.6 top-1, 81.3 of the baseline; 1.51x faster by compute, 1.49x by wall time (paper).
Source:   released code of EfficientTrain++; ../_base_/imagenet_supervised.py has what all models share.
"""

_base_ = "../_base_/imagenet_supervised.py"

model = dict(name="swin_tiny_patch4_window7_224", drop_path_rate=0.2)
curriculum = dict(published_speedup=1.51)
batch = dict(micro_batch_size=256)
optimizer = dict(clip_grad_norm=5.0)
run = dict(precision="fp16")
