"""A small MAE on CIFAR-10 under the EfficientTrain++ curriculum. HOG targets: --cfg-options model.target=hog.

Command:  MAE_ET_CIFAR10=/data/cifar10 python tools/pretrain.py configs/pretrain/cifar10_etpp.py
Hardware: two CPU cores; results/ lists the minutes.
Expected: see results/.
Source:   ours. The preset's bandwidths 96, 160, 224 scale to 13.7, 22.9, 32 at 32 px. With patches of 4 px the stages use
          16, 24, 32, because 12 px leave 2 visible patches of 9.
"""

_base_ = "../_base_/cifar10_mae.py"

curriculum = dict(
    preset="custom",
    stages=[
        dict(compute_fraction=0.2, bandwidth=16),
        dict(compute_fraction=0.4, bandwidth=24),
        dict(compute_fraction=0.4, bandwidth=32),
    ],
    equivalent_epochs=6,
)
