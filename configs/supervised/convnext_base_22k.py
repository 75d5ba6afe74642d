"""ConvNeXt-Base on ImageNet-22K under EfficientTrain++, 60 equivalent epochs.

Command:  torchrun --nproc_per_node 8 -m mae_et supervised convnext_base_22k
          Other budgets: add --cfg-options curriculum.equivalent_epochs=30
          Fine-tuning on ImageNet-1K: convnext_base_22k_finetune
Hardware: written for 8 GPUs of 24 GB; accumulation follows for other numbers. Not run by this project: no hours.
Expected: 85.9/86.9 in 122.3 GPU-days (1.49x), 85.8/86.7 of the baseline in 181.9 GPU-days (paper).
Source:   ConvNeXt's own 22K training: batch 4096, lr 4e-3, drop path 0.1, warm-up of 5 epochs (2.55 equivalent epochs at
          160 px), no moving average. Micro batch and precision are ours.
"""

_base_ = "../_base_/imagenet_22k_supervised.py"

model = dict(name="convnext_base", drop_path_rate=0.1)
curriculum = dict(preset="etpp_convnext", equivalent_epochs=60, warmup_equivalent_epochs=2.55)
batch = dict(micro_batch_size=64)
