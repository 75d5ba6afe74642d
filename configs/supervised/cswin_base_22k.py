"""CSWin-Base on ImageNet-22K under EfficientTrain++, 45 equivalent epochs.

Command:  torchrun --nproc_per_node 8 -m mae_et supervised cswin_base_22k
          Other budgets: add --cfg-options curriculum.equivalent_epochs=30
          Fine-tuning on ImageNet-1K: cswin_base_22k_finetune
Hardware: written for 8 GPUs of 24 GB; accumulation follows for other numbers. Not run by this project: no hours.
Expected: 86.4/87.4, and 86.0/87.1 at 30 equivalent epochs, with Early Large Batch; 62.9 GPU-days (2.02x) and 41.9 (3.03x)
          without it; 86.0/87.2 of the baseline in 126.9 GPU-days (paper).
Source:   CSWin's 22K recipe is not published. lr 1e-3 at 4096 images, drop path 0.2, warm-up of 5 epochs (0.92 equivalent
          epochs at 96 px) and clipping at 5 are those of Swin-B's; micro batch and precision are ours. The paper uses Early
          Large Batch to scale to 64 GPUs and prints no rule for the batch: area and its limit are ours. Without it:
          --cfg-options batch.early_large_batch.rule=none batch.early_large_batch.max_global_batch_size=None
"""

_base_ = "../_base_/imagenet_22k_supervised.py"

model = dict(name="cswin_base_224", drop_path_rate=0.2)
curriculum = dict(equivalent_epochs=45, warmup_equivalent_epochs=0.92)
batch = dict(micro_batch_size=128, early_large_batch=dict(rule="area", max_global_batch_size=16384))
optimizer = dict(base_lr=6.25e-5, clip_grad_norm=5.0)
