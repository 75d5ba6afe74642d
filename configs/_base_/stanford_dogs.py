"""Base: Stanford Dogs: 120 breeds, as image folders. MAE_ET_DATA is the folder of the data, else data/."""

_base_ = "./fine_grained.py"

data = dict(
    train="{{$MAE_ET_DATA:data}}/stanford_dogs/train", val="{{$MAE_ET_DATA:data}}/stanford_dogs/test", num_images=12000
)
