"""CSWin-Small on ImageNet-1K under EfficientTrain++, 200 equivalent epochs.

Command:  torchrun --nproc_per_node 8 -m mae_et supervised cswin_small
          Baseline: add --cfg-options curriculum.preset=constant curriculum.equivalent_epochs=300
          curriculum.warmup_equivalent_epochs=20 model.drop_path_epochs=300
Hardware: written for 8 GPUs of 24 GB; accumulation follows for other numbers. Not run by this project: no hours.
Expected: 83.6 top-1, 83.4 of the baseline; 1.52x faster by compute, 1.52x by wall time (paper).
Source:   released code of EfficientTrain++; ../_base_/imagenet_supervised.py has what all models share.
"""

_base_ = "../_base_/imagenet_supervised.py"

model = dict(name="cswin_small_224", drop_path_rate=0.4)
curriculum = dict(published_speedup=1.52)
regularization = dict(ema_decay=0.9999)
run = dict(precision="fp16")
