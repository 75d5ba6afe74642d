"""Base: Food-101: 101 dishes. MAE_ET_DATA is the folder of the data, else data/."""

_base_ = "./fine_grained.py"

data = dict(
    train="torchvision:food101@{{$MAE_ET_DATA:data}}",
    val="torchvision:food101@{{$MAE_ET_DATA:data}},split=test",
    num_images=75750,
)
