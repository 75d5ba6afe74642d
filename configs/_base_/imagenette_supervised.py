"""Base: small classifiers on Imagenette (9,469 photos of 10 classes) at 112 px, half of the paper's geometry.

The preset's bandwidths 96, 160, 224 become 48, 80, 112. The augmentation is the same at all strengths, and there is no mixup,
cutmix or erasing: at ten epochs strong regularization costs accuracy, and a comparison shall show the crop alone.
"""

data = dict(
    train="{{$MAE_ET_IMAGENETTE:data/imagenette}}/train",
    val="{{$MAE_ET_IMAGENETTE:data/imagenette}}/val",
    num_images=9469,
    image_size=112,
    loading="fast",
    augmentation=dict(ramp="none", min_scale=0.25),
)
curriculum = dict(
    preset="etpp", equivalent_epochs=8, baseline_equivalent_epochs=8, warmup_equivalent_epochs=0.4
)
batch = dict(global_batch_size=64)
optimizer = dict(base_lr=4e-3)
regularization = dict(mixup=0.0, cutmix=0.0, erasing=0.0)
run = dict(precision="bf16", save_interval=200)
