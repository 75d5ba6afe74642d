"""Demo: linear probe on generated scenes with the backbone of configs/pretrain/demo.py.

Command:  python tools/classify.py configs/classification/demo_linear.py --backbone work_dirs/demo/etpp/backbone.safetensors
Hardware: two CPU cores, half a minute.
Expected: 23% after the demo's pre-training, 16% untrained (`--backbone random`); chance is 10%.
Source:   the MAE paper's probe (LARS, BatchNorm without parameters), shortened and on the mean of the patch tokens (ours).
"""

_base_ = ["../_base_/scenes.py", "../_base_/mae_linear.py"]

data = dict(augmentation=dict(min_scale=0.9))
model = dict(pool="avg")
curriculum = dict(equivalent_epochs=3, baseline_equivalent_epochs=3, warmup_equivalent_epochs=0.3)
batch = dict(global_batch_size=256)
optimizer = dict(base_lr=6.0)
run = dict(log_interval=20, save_interval=1000)
eval_interval = 1000  # at the end
