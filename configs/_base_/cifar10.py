"""Base: CIFAR-10 as WebDataset shards, with a model sized for two CPU cores.

Set MAE_ET_CIFAR10 to the folder that holds train-000000.tar.gz, ... and test-000000.tar.gz, or use torchvision's copy:
--cfg-options data.train=torchvision:cifar10@ROOT data.val=torchvision:cifar10@ROOT,split=test
"""

data = dict(
    train="{{$MAE_ET_CIFAR10:data/cifar10}}/train-{000000..000004}.tar.gz",
    val="{{$MAE_ET_CIFAR10:data/cifar10}}/test-000000.tar.gz",
    num_images=50000,
    image_size=32,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    eval_crop_ratio=1.0,
)
model = dict(size="tiny", patch_size=4, embed_dim=128, depth=4, num_heads=4)
