"""Base: classification on Imagenette with the small ViT of configs/pretrain/imagenette.py, at 112 px.

Set MAE_ET_IMAGENETTE to the folder that holds train/ and val/.
"""

data = dict(
    train="{{$MAE_ET_IMAGENETTE:data/imagenette}}/train",
    val="{{$MAE_ET_IMAGENETTE:data/imagenette}}/val",
    num_images=9469,
    image_size=112,
    loading="fast",
)
model = dict(size="tiny", patch_size=8, embed_dim=128, depth=4, num_heads=4)
run = dict(precision="bf16")
