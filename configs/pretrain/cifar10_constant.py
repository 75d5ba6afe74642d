"""A small MAE on CIFAR-10 at full image size: the baseline of configs/pretrain/cifar10_etpp.py.

Command:  MAE_ET_CIFAR10=/data/cifar10 python tools/pretrain.py configs/pretrain/cifar10_constant.py
Hardware: two CPU cores; results/ lists the minutes.
Expected: see results/.
Source:   ours; only the curriculum differs from cifar10_etpp.py.
"""

_base_ = "../_base_/cifar10_mae.py"

curriculum = dict(preset="constant", equivalent_epochs=6)
