"""Base: ImageNet-1K with labels.

Set MAE_ET_IMAGENET to the folder that holds train/ and val/, or pass --cfg-options data.train=... data.val=...
Shards: --cfg-options 'data.train=/data/imagenet-train-{000000..000146}.tar'.
"""

data = dict(
    train="{{$MAE_ET_IMAGENET:data/imagenet}}/train",
    val="{{$MAE_ET_IMAGENET:data/imagenet}}/val",
    num_images=1281167,
    image_size=224,
    loading="fast",  # PSNR 74 dB against Pillow's pixels, in half the time; "exact" is Pillow itself
)
