"""A small MAE on CIFAR-10 under the EfficientTrain++ curriculum, with HOG targets.

Command:  MAE_ET_CIFAR10=/data/cifar10 python tools/pretrain.py configs/pretrain/cifar10_etpp_hog.py
Hardware: two CPU cores; the step costs what the pixel target's does.
Expected: not run to the end by us. Its loss cannot be compared with that of pixels.
Source:   ours: cifar10_etpp.py with histograms of oriented gradients in cells of 2 px, half a patch.
"""

_base_ = "cifar10_etpp.py"

model = dict(target="hog")
