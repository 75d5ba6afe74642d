"""kNN of an MAE ViT-Base/16 on ImageNet-1K.

Command:  python tools/classify.py configs/classification/imagenet_knn_base.py --backbone FILE
Hardware: one GPU. Not run by this project, so no hours are given.
Expected: no number in the MAE paper.
Source:   weighted kNN of Wu et al. (arXiv 1805.01978), k and temperature of DINO (arXiv 2104.14294).
"""

_base_ = "../_base_/imagenet.py"

protocol = "knn"
model = dict(size="base", pool="avg")
knn = dict(ks=(10, 20, 100, 200), temperature=0.07)
