"""Base: generated scenes of ten classes, sized for two CPU cores."""

data = dict(
    train="scenes:4000@64,seed=0",
    val="scenes:1000@64,seed=1",
    num_images=4000,
    image_size=64,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    eval_crop_ratio=0.75,  # the main object is near the middle
    augmentation=dict(min_scale=0.6),
)
model = dict(size="tiny", patch_size=8, embed_dim=128, depth=4, num_heads=4)
