"""Fine-tuning on CIFAR-10 from the small MAE of configs/pretrain/cifar10_*.py.

Command:  MAE_ET_CIFAR10=/data/cifar10 python tools/classify.py configs/classification/cifar10_finetune.py --backbone FILE
Hardware: two CPU cores; results/ lists the minutes.
Expected: see results/.
Source:   the MAE paper's recipe, shortened, with weaker regularisation because the training is short (ours).
"""

_base_ = ["../_base_/cifar10.py", "../_base_/mae_finetune.py"]

data = dict(augmentation=dict(ramp="none", min_scale=0.35))
curriculum = dict(equivalent_epochs=3, baseline_equivalent_epochs=3, warmup_equivalent_epochs=0.3)
batch = dict(global_batch_size=128)
optimizer = dict(base_lr=2e-3, layer_decay=0.75)
regularization = dict(mixup=0.0, cutmix=0.0, erasing=0.0, label_smoothing=0.1)
run = dict(precision="fp32", log_interval=50, save_interval=500)
