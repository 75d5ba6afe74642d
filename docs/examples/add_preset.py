"""Adds a curriculum: two stages, the first at half of the final size. A pre-training config of generated scenes.

Command:  python tools/pretrain.py docs/examples/add_preset.py
Hardware: two CPU cores, less than a minute.
Expected: the plan shows two stages of 50% of the compute, at bandwidths 32 and 64; the loss falls.
Source:   ours, an example.
"""

data = dict(train="scenes:500@64", num_images=500, image_size=64, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
model = dict(
    size="tiny",
    patch_size=8,
    embed_dim=96,
    depth=3,
    num_heads=3,
    decoder_embed_dim=48,
    decoder_depth=1,
    decoder_num_heads=3,
)
curriculum = dict(
    preset="custom",
    stages=[
        dict(compute_fraction=0.5, bandwidth=32, strength=0.0),
        dict(compute_fraction=0.5, bandwidth=64, strength=1.0),
    ],
    equivalent_epochs=5,
    baseline_equivalent_epochs=10,
    warmup_equivalent_epochs=0.5,
)
batch = dict(global_batch_size=32)
optimizer = dict(base_lr=3e-3)
