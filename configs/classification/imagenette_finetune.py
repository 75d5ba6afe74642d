"""Fine-tuning on Imagenette from the small MAE of configs/pretrain/imagenette.py.

Command:  MAE_ET_IMAGENETTE=/data/imagenette python tools/classify.py configs/classification/imagenette_finetune.py --backbone FILE
Hardware: one CPU core with bf16 instructions; results/ lists the minutes.
Expected: see results/.
Source:   the MAE paper's recipe, shortened, with weaker regularization because the training is short (ours).
"""

_base_ = ["../_base_/imagenette.py", "../_base_/mae_finetune.py"]

data = dict(augmentation=dict(ramp="none", min_scale=0.35))
curriculum = dict(equivalent_epochs=3, baseline_equivalent_epochs=3, warmup_equivalent_epochs=0.3)
batch = dict(global_batch_size=128)
optimizer = dict(base_lr=2e-3, layer_decay=0.75)
regularization = dict(mixup=0.0, cutmix=0.0, erasing=0.0, label_smoothing=0.1)
run = dict(log_interval=50, save_interval=200)
