"""Fine-tuning on labelled photos from the backbone of configs/pretrain/photos.py.

Set data.train and data.val: folders with one folder per class.

Command:  mae-et classify photos_finetune --backbone work_dirs/photos --cfg-options data.train=/data/train data.val=/data/val
          (from a checkout also: configs/classification/photos_finetune.py)
Hardware: one GPU. Not run by this project at its full length, so no hours are given.
Expected: above `photos_knn` and `photos_sweep` on the same data.
Source:   the MAE paper's recipe of fine-tuning; the batch, which suits small sets, and the layer decay of a ViT-Small are ours.
"""

_base_ = ["../_base_/imagenet.py", "../_base_/mae_finetune.py"]

data = dict(
    train="{{$MAE_ET_PHOTOS_TRAIN:data/train}}",
    val="{{$MAE_ET_PHOTOS_VAL:data/val}}",
    num_images=None,
    loading="exact",
    augmentation=dict(ramp="randaugment", min_scale=0.08, color_jitter=0.0),
)
model = dict(size="small", drop_path_rate=0.1)
curriculum = dict(equivalent_epochs=100, baseline_equivalent_epochs=100)
batch = dict(global_batch_size=256, micro_batch_size=64)
optimizer = dict(base_lr=0.0005, layer_decay=0.75)
