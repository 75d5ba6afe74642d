"""Base: pre-training on CIFAR-10 with a small MAE and patches of 4 px. Two CPU cores train it in minutes."""

_base_ = "cifar10.py"

model = dict(mask_ratio=0.75, norm_pix_loss=True, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=4)
curriculum = dict(warmup_equivalent_epochs=0.3, baseline_equivalent_epochs=6)
batch = dict(global_batch_size=128)
optimizer = dict(base_lr=2e-3)
run = dict(precision="fp32", save_interval=500, log_interval=50, knn_max_images=5000)
