"""Demo: kNN on generated scenes, with the features of the backbone of configs/pretrain/demo.py.

Command:  python tools/classify.py configs/classification/demo_knn.py --backbone work_dirs/demo/etpp/backbone.safetensors
Hardware: two CPU cores, less than half a minute.
Expected: k = 20, over three seeds of the pre-training: 23.4% +- 1.5 (curriculum.preset=constant at the same cost: 17.7% +- 0.4).
          Untrained (`--backbone random`): 14.0%. Chance: 10%.
Source:   weighted kNN of Wu et al. (arXiv 1805.01978); the mean of the patch tokens is ours.
"""

_base_ = "../_base_/scenes.py"

protocol = "knn"
data = dict(train="scenes:2000@112,seed=0", num_images=2000)  # enough neighbours, in half the time
model = dict(pool="avg")
knn = dict(ks=(10, 20, 100))
run = dict(precision="fp32")
