"""CSWin-Tiny on ImageNet-1K under EfficientTrain++, 200 equivalent epochs.

Command:  torchrun --nproc_per_node 8 -m mae_et supervised cswin_tiny
          Baseline: add --cfg-options curriculum.preset=constant curriculum.equivalent_epochs=300
          curriculum.warmup_equivalent_epochs=20 model.drop_path_epochs=300
Hardware: written for 8 GPUs of 24 GB; accumulation follows for other numbers. Not run by this project: no hours.
Expected: 82.9 top-1, 82.7 of the baseline; 1.52x faster by compute, 1.50x by wall time (paper).
Source:   released code of EfficientTrain++; ../_base_/imagenet_supervised.py has what all models share.
"""

_base_ = "../_base_/imagenet_supervised.py"

model = dict(name="cswin_tiny_224", drop_path_rate=0.2)
curriculum = dict(published_speedup=1.52)
batch = dict(micro_batch_size=256)
regularization = dict(ema_decay=0.9999)
run = dict(precision="fp16")
