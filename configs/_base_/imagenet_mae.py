"""Base: pre-training on ImageNet-1K with the augmentation and optimizer of the MAE paper (arXiv 2111.06377)."""

_base_ = "./imagenet.py"

model = dict(mask_ratio=0.75, norm_pix_loss=True)
curriculum = dict(baseline_equivalent_epochs=1600, warmup_equivalent_epochs=40, centered=True)
batch = dict(global_batch_size=4096)
optimizer = dict(base_lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05)
run = dict(save_interval=1000, log_interval=50, knn_interval=20000)
