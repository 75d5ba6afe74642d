"""Base of the golden classifications that train."""

_base_ = "classify.py"

batch = {"global_batch_size": 8, "micro_batch_size": 8}
curriculum = {"preset": "constant", "equivalent_epochs": 2.4, "warmup_equivalent_epochs": 0.4}
run = {"log_interval": 1}
