"""ConvNeXt-Large on ImageNet-22K under EfficientTrain++, 60 equivalent epochs.

Command:  torchrun --nproc_per_node 8 -m mae_et supervised convnext_large_22k
          Other budgets: add --cfg-options curriculum.equivalent_epochs=30
          Fine-tuning on ImageNet-1K: convnext_large_22k_finetune
Hardware: written for 8 GPUs of 24 GB; accumulation follows for other numbers. Not run by this project: no hours.
Expected: 86.5/87.3 in 249.3 GPU-days (1.51x), 86.4/87.3 of the baseline in 375.8 GPU-days (paper).
Source:   ConvNeXt's own 22K training: batch 4096, lr 4e-3, drop path 0.1, warm-up of 5 epochs (2.55 equivalent epochs at
          160 px), no moving average. Micro batch and precision are ours.
"""

_base_ = "../_base_/imagenet_22k_supervised.py"

model = dict(name="convnext_large", drop_path_rate=0.1)
curriculum = dict(preset="etpp_convnext", equivalent_epochs=60, warmup_equivalent_epochs=2.55)
batch = dict(micro_batch_size=32)
