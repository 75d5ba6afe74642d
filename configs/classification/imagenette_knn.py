"""kNN on Imagenette with the small MAE of configs/pretrain/imagenette.py.

Command:  MAE_ET_IMAGENETTE=/data/imagenette python tools/classify.py configs/classification/imagenette_knn.py --backbone FILE
Hardware: one CPU core, about a minute.
Expected: see results/.
Source:   weighted kNN of Wu et al. (arXiv 1805.01978); the mean of the patch tokens is our choice.
"""

_base_ = "../_base_/imagenette.py"

protocol = "knn"
model = dict(pool="avg")
