"""CSWin-Base on ImageNet-1K under EfficientTrain++, 200 equivalent epochs.

Command:  torchrun --nproc_per_node 8 -m mae_et supervised cswin_base
          Baseline: add --cfg-options curriculum.preset=constant curriculum.equivalent_epochs=300
          curriculum.warmup_equivalent_epochs=20 model.drop_path_epochs=300
Hardware: written for 8 GPUs of 24 GB; accumulation follows for other numbers. Not run by this project: no hours.
Expected: 84.3 top-1, 84.3 of the baseline; 1.51x faster by compute, 1.52x by wall time (paper).
Source:   released code of EfficientTrain++: LAMB, lr 8e-3 at 4096 images, clipping at 1.0 as inside its LAMB.
          ../_base_/imagenet_supervised.py has what all models share.
"""

_base_ = "../_base_/imagenet_supervised.py"

model = dict(name="cswin_base_224", drop_path_rate=0.5)
curriculum = dict(published_speedup=1.51)
optimizer = dict(name="lamb", base_lr=5e-4, weight_decay=0.1, eps=1e-6, clip_grad_norm=1.0)
regularization = dict(ema_decay=0.9998)
run = dict(precision="fp16")
