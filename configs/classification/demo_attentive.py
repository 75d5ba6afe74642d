"""Demo: attentive probe on generated scenes, with the features of the backbone of configs/pretrain/demo.py.

Command:  python tools/classify.py configs/classification/demo_attentive.py --backbone work_dirs/demo/etpp/backbone.safetensors
Hardware: two CPU cores, about two minutes.
Expected: not measured over seeds. Compare it with `demo_linear` and with `--backbone random`.
Source:   pooling as in CAE (arXiv 2202.03026) and AIM (arXiv 2401.08541); learning rate and length are ours.
"""

_base_ = "../_base_/scenes.py"

protocol = "attentive_probe"
data = dict(augmentation=dict(min_scale=0.4))  # as in demo_linear
curriculum = dict(preset="constant", equivalent_epochs=2, baseline_equivalent_epochs=2, warmup_equivalent_epochs=0.2)
batch = dict(global_batch_size=64)
optimizer = dict(name="adamw", base_lr=0.008, weight_decay=0.0)
run = dict(precision="fp32", log_interval=20, save_interval=1000)
eval_interval = 1000  # at the end
