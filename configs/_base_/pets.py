"""Base: Oxford-IIIT Pet: 37 breeds. MAE_ET_DATA is the folder of the data, else data/."""

_base_ = "./fine_grained.py"

data = dict(
    train="torchvision:oxford_iiit_pet@{{$MAE_ET_DATA:data}}",
    val="torchvision:oxford_iiit_pet@{{$MAE_ET_DATA:data}},split=test",
    num_images=3680,
)
