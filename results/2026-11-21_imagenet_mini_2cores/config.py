"""The resolved config of this run."""

batch = dict(global_batch_size=64, micro_batch_size=None)
curriculum = dict(
    baseline_equivalent_epochs=240.0,
    centered=True,
    equivalent_epochs=24.0,
    preset='etpp',
    stages=[],
    warmup_equivalent_epochs=1.0)
data = dict(
    augmentation=dict(
        color_jitter=0.4,
        flip=True,
        max_magnitude=9.0,
        min_scale=0.2,
        ramp='none',
        start_min_scale=0.67),
    eval_crop_ratio=0.875,
    image_size=64,
    max_bad_fraction=0.01,
    mean=[
        0.485,
        0.456,
        0.406,
    ],
    num_images=1000,
    num_workers=0,
    std=[
        0.229,
        0.224,
        0.225,
    ],
    train='data/imagenet_mini/train',
    val=None)
model = dict(
    decoder_depth=1,
    decoder_embed_dim=64,
    decoder_num_heads=4,
    depth=4,
    embed_dim=128,
    in_chans=3,
    init_from=None,
    mask_ratio=0.75,
    norm_pix_loss=False,
    num_heads=4,
    patch_size=8,
    size='tiny')
optimizer = dict(
    base_lr=0.003,
    betas=[
        0.9,
        0.95,
    ],
    clip_grad_norm=None,
    eps=1e-08,
    min_lr=0.0,
    weight_decay=0.05)
run = dict(
    activation_checkpointing=False,
    compile=False,
    keep_checkpoints=2,
    knn_interval=0,
    knn_max_images=5000,
    log_interval=20,
    max_skipped_steps=0,
    picture_interval=0,
    precision='auto',
    save_interval=500,
    seed=0)
