"""kNN on CIFAR-10 with the small MAE of configs/pretrain/cifar10_*.py.

Command:  MAE_ET_CIFAR10=/data/cifar10 python tools/classify.py configs/classification/cifar10_knn.py --backbone FILE
Hardware: two CPU cores; results/ lists the minutes.
Expected: see results/.
Source:   weighted kNN of Wu et al. (arXiv 1805.01978); the mean of the patch tokens is our choice.
"""

_base_ = "../_base_/cifar10.py"

protocol = "knn"
model = dict(pool="avg")
knn = dict(ks=(10, 20, 100, 200))
run = dict(precision="fp32")
