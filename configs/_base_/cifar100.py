"""Base: CIFAR-100: 100 classes at 32 px, enlarged to 224. MAE_ET_DATA is the folder of the data, else data/."""

_base_ = "./fine_grained.py"

data = dict(
    train="torchvision:cifar100@{{$MAE_ET_DATA:data}}",
    val="torchvision:cifar100@{{$MAE_ET_DATA:data}},split=test",
    num_images=50000,
)
