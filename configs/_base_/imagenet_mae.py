"""Base of the ImageNet-1K pre-trainings: data, augmentation and optimizer of the MAE paper (arXiv 2111.06377).

Set MAE_ET_IMAGENET to the folder that holds train/ and val/, or pass --cfg-options data.train=... data.val=...
Shards: --cfg-options 'data.train=/data/imagenet-train-{000000..000146}.tar'.
"""

data = dict(
    train="{{$MAE_ET_IMAGENET:data/imagenet}}/train",
    val="{{$MAE_ET_IMAGENET:data/imagenet}}/val",
    num_images=1281167,
    image_size=224,
)
model = dict(mask_ratio=0.75, norm_pix_loss=True)
curriculum = dict(baseline_equivalent_epochs=1600, warmup_equivalent_epochs=40, centered=True)
batch = dict(global_batch_size=4096)
optimizer = dict(base_lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05)
run = dict(save_interval=1000, log_interval=50, knn_interval=20000)
