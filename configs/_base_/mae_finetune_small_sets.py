"""Base: fine-tuning an MAE ViT-Base/16 on a small data set, with MAE's ImageNet recipe and a batch of 256 (ours)."""

_base_ = "./mae_finetune.py"

model = dict(size="base", drop_path_rate=0.1)
curriculum = dict(equivalent_epochs=100, baseline_equivalent_epochs=100)
batch = dict(global_batch_size=256, micro_batch_size=64)
optimizer = dict(base_lr=1e-3, layer_decay=0.65)
