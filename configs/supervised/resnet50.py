"""ResNet-50 on ImageNet-1K under EfficientTrain++, 200 equivalent epochs.

Command:  torchrun --nproc_per_node 8 -m mae_et supervised resnet50
          Baseline: add --cfg-options curriculum.preset=constant curriculum.equivalent_epochs=300
          curriculum.warmup_equivalent_epochs=20
Hardware: written for 8 GPUs of 24 GB; accumulation follows for other numbers. Not run by this project: no hours.
Expected: 79.6 top-1, 78.8 of the baseline; 1.49x faster by compute, 1.45x by wall time (paper).
Source:   released code of EfficientTrain++, which trains torchvision's ResNet-50: its residual branches do not start at zero.
          ../_base_/imagenet_supervised.py has what all models share.
"""

_base_ = "../_base_/imagenet_supervised.py"

model = dict(name="resnet50", options=dict(zero_init_last=False), drop_path_epochs=None)
curriculum = dict(published_speedup=1.49)
batch = dict(micro_batch_size=512)
run = dict(precision="fp32")
