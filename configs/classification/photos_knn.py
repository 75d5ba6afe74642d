"""kNN on labelled photos with the backbone of configs/pretrain/photos.py.

The default of mae_et.classify. Set data.train and data.val: folders with one folder per class.

Command:  mae-et classify photos_knn --backbone work_dirs/photos --cfg-options data.train=/data/train data.val=/data/val
          (from a checkout also: configs/classification/photos_knn.py)
Hardware: one GPU or a few CPU cores.
Expected: well above `--backbone random` on the same data, which is what to compare with.
Source:   weighted kNN of Wu et al. (arXiv 1805.01978), k and temperature of DINO (arXiv 2104.14294); the mean of the patch
          tokens is our choice.
"""

_base_ = "./imagenet_knn_base.py"

data = dict(train="{{$MAE_ET_PHOTOS_TRAIN:data/train}}", val="{{$MAE_ET_PHOTOS_VAL:data/val}}", num_images=None, loading="exact")
model = dict(size="small")
knn = dict(ks=(10, 20))
