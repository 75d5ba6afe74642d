"""Linear probe on CIFAR-10 with the small MAE of configs/pretrain/cifar10_*.py.

Command:  MAE_ET_CIFAR10=/data/cifar10 python tools/classify.py configs/classification/cifar10_linear.py --backbone FILE
Hardware: two CPU cores; results/ lists the minutes.
Expected: see results/.
Source:   the MAE paper's probe (LARS, BatchNorm without parameters), shortened and on the mean of the patch tokens (ours).
"""

_base_ = ["../_base_/cifar10.py", "../_base_/mae_linear.py"]

model = dict(pool="avg")
curriculum = dict(equivalent_epochs=2, baseline_equivalent_epochs=2, warmup_equivalent_epochs=0.2)
batch = dict(global_batch_size=512)
optimizer = dict(base_lr=1.0)
run = dict(precision="fp32", log_interval=20, save_interval=100)
