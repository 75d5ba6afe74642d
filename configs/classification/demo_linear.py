"""Demo: linear probe on generated scenes, with the features of the backbone of configs/pretrain/demo.py.

Command:  python tools/classify.py configs/classification/demo_linear.py --backbone work_dirs/demo/etpp/backbone.safetensors
Hardware: two CPU cores, about a minute.
Expected: TODO
Source:   the MAE paper's probe (LARS, BatchNorm without parameters); two epochs, small batches and the mean of the patch
          tokens are ours.
"""

_base_ = ["../_base_/scenes.py", "../_base_/mae_linear.py"]

data = dict(augmentation=dict(min_scale=0.9))
model = dict(pool="avg")
curriculum = dict(equivalent_epochs=2, baseline_equivalent_epochs=2, warmup_equivalent_epochs=0.2)
batch = dict(global_batch_size=64)
optimizer = dict(base_lr=24.0)
run = dict(log_interval=20, save_interval=1000)
eval_interval = 1000  # at the end
