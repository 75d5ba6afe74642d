"""Demo: kNN on generated scenes with the backbone of configs/pretrain/demo.py.

Command:  python tools/classify.py configs/classification/demo_knn.py --backbone work_dirs/demo/etpp/backbone.safetensors
Hardware: two CPU cores, seconds.
Expected: 28% after the demo's pre-training (k = 20), 17% untrained (`--backbone random`).
Source:   weighted kNN of Wu et al. (arXiv 1805.01978); the mean of the patch tokens is our choice.
"""

_base_ = "../_base_/scenes.py"

protocol = "knn"
model = dict(pool="avg")
knn = dict(ks=(10, 20, 100))
