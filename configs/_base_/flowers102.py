"""Base: Flowers-102; needs scipy. MAE_ET_DATA is the folder of the data, else data/."""

_base_ = "./fine_grained.py"

data = dict(
    train="torchvision:flowers102@{{$MAE_ET_DATA:data}}",
    val="torchvision:flowers102@{{$MAE_ET_DATA:data}},split=test",
    num_images=1020,
)
