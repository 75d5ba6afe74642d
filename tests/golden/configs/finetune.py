"""Golden fine-tuning: everything on that draws random numbers, layer decay and a moving average of the weights."""

_base_ = "classify_training.py"

protocol = "finetune"
data = {"augmentation": {"ramp": "randaugment"}}
model = {"drop_path_rate": 0.2}
optimizer = {"base_lr": 0.096, "weight_decay": 2.0, "betas": [0.9, 0.999], "layer_decay": 0.75}
regularization = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25, "label_smoothing": 0.1, "ema_decay": 0.8}
