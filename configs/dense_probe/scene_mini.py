"""Dense probe of a ViT on photos with masks in the layout of ADE20K; the data of configs/segmentation/scene_mini.py.

Your own data: data.root, and data.train_images and the like for another layout.

Command:  MAE_ET_SCENE_MINI=/data/scene_mini python tools/dense_probe.py configs/dense_probe/scene_mini.py --backbone FILE
Hardware: one CPU core; a ViT-Base takes minutes for 1000 images at 224 px.
Expected: above `--backbone random` of the same sizes, which is what to compare with.
Source:   linear head and k = 30 neighbours as in frozen dense evaluations of other projects; the values are ours.
"""

data = dict(root="{{$MAE_ET_SCENE_MINI:data/scene_mini}}")
model = dict(size="base")  # of random weights
