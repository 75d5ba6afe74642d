"""Demo: kNN on generated scenes, with the features of the backbone of configs/pretrain/demo.py.

Command:  python tools/classify.py configs/classification/demo_knn.py --backbone work_dirs/demo/etpp/backbone.safetensors
Hardware: two CPU cores, less than half a minute.
Expected: 23.4% (k = 20) with the curriculum, 17.7% at full size; means over three seeds.
Source:   weighted kNN of Wu et al. (arXiv 1805.01978); the mean of the patch tokens is our choice.
"""

_base_ = "../_base_/scenes.py"

protocol = "knn"
data = dict(train="scenes:2000@112,seed=0", num_images=2000)  # enough neighbours, in half the time
model = dict(pool="avg")
knn = dict(ks=(10, 20, 100))
