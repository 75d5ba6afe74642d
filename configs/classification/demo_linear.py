"""Demo: linear probe on generated scenes, with the features of the backbone of configs/pretrain/demo.py.

Command:  python tools/classify.py configs/classification/demo_linear.py --backbone work_dirs/demo/etpp/backbone.safetensors
Hardware: two CPU cores, about a minute.
Expected: over three seeds of the pre-training: 40.4% +- 2.3 (curriculum.preset=constant at the same cost: 29.6% +- 0.6).
          Untrained (`--backbone random`): 29.1%. Chance: 10%.
Source:   ours; BatchNorm without parameters as in the MAE paper's probe. Its LARS needs far more than these 125 steps.
"""

_base_ = "../_base_/scenes.py"

protocol = "linear_probe"
data = dict(augmentation=dict(min_scale=0.4))  # crops about as large as that of the evaluation
model = dict(pool="avg")
curriculum = dict(preset="constant", equivalent_epochs=2, baseline_equivalent_epochs=2, warmup_equivalent_epochs=0.2)
batch = dict(global_batch_size=64)
optimizer = dict(name="adamw", base_lr=0.4, weight_decay=0.0)
run = dict(precision="fp32", log_interval=20, save_interval=1000)
eval_interval = 1000  # at the end
