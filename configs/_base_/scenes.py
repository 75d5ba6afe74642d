"""Base of the demo configs: generated scenes of ten classes and a small ViT, sized for two CPU cores.

112 px with patches of 8 px gives the grids of the paper: 6 x 6, 10 x 10 and 14 x 14 patches at the etpp bandwidths 48, 80, 112.
"""

data = dict(
    train="scenes:4000@112,seed=0",
    val="scenes:1000@112,seed=1",
    num_images=4000,
    image_size=112,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    eval_crop_ratio=0.75,  # the main object stands near the middle
    augmentation=dict(min_scale=0.6),
)
model = dict(size="tiny", patch_size=8, embed_dim=128, depth=4, num_heads=4)
