"""Golden linear probe: LARS, and the batch normalisation before the head."""

_base_ = "classify_training.py"

protocol = "linear_probe"
optimizer = {"name": "lars", "base_lr": 100.0, "weight_decay": 0.0}
