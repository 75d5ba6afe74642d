"""MAE ViT-Small/16 on a folder of photos, 400 equivalent epochs under the EfficientTrain++ curriculum. For one GPU.

The default of mae_et.pretrain. Set data.train to the folder; no labels are needed. `mae-et stats FOLDER` measures mean and std
of images that are not like photos. With more than a million images use mae_base_etpp_400e_imagenet.

Command:  mae-et pretrain photos --cfg-options data.train=/data/photos (from a checkout also: configs/pretrain/photos.py)
Hardware: written for one GPU with 16 GB; lower batch.micro_batch_size if memory is short. Not run by this project at this
          length, so no hours are given; mae-et plan photos --dataset-size N prints the compute.
Expected: no published number.
Source:   recipe of the MAE paper, in ../_base_/imagenet_mae.py. Ours: a small model and a batch of 256, so that a set of
          thousands of photos has thousands of steps; base_lr is the paper's, which gives lr 1.5e-4.
"""

_base_ = "../_base_/imagenet_mae.py"

data = dict(train="{{$MAE_ET_PHOTOS:data/photos}}", val=None, num_images=None, loading="exact")
model = dict(size="small")
curriculum = dict(preset="etpp", equivalent_epochs=400)
batch = dict(global_batch_size=256, micro_batch_size=256)
