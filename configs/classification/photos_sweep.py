"""Linear probe on labelled photos with the backbone of configs/pretrain/photos.py; learning rate and weight decay are swept.

Set data.train and data.val: folders with one folder per class. Few-shot: add labels.images_per_class=10.

Command:  mae-et classify photos_sweep --backbone work_dirs/photos --cfg-options data.train=/data/train data.val=/data/val
          (from a checkout also: configs/classification/photos_sweep.py)
Hardware: one GPU or a few CPU cores. The features take the time of `photos_knn`, the heads little more.
Expected: above `photos_knn` where there are enough labels.
Source:   heads side by side as in the linear evaluation of DINOv2 (arXiv 2304.07193); values, choice and features are ours.
"""

_base_ = "../_base_/imagenet.py"

protocol = "linear_sweep"
data = dict(train="{{$MAE_ET_PHOTOS_TRAIN:data/train}}", val="{{$MAE_ET_PHOTOS_VAL:data/val}}", num_images=None, loading="exact")
model = dict(size="small", pool="avg")
