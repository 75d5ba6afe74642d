"""Base: fine-tuning a supervised DeiT-S on a small data set, from its cls token, with a batch of 256.

Learning rate, layer decay and length are ours: the recipe of the EfficientTrain papers is not known.
"""

_base_ = "./mae_finetune.py"

model = dict(size="small", pool="token", drop_path_rate=0.1)
curriculum = dict(equivalent_epochs=100, baseline_equivalent_epochs=100)
batch = dict(global_batch_size=256, micro_batch_size=64)
optimizer = dict(base_lr=2.5e-4, layer_decay=0.75)
