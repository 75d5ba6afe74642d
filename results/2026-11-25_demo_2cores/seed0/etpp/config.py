"""The resolved config of this run."""

batch = dict(
    early_large_batch=dict(
        max_global_batch_size=None, max_lr=None, rule='none'),
    global_batch_size=64,
    micro_batch_size=None,
    micro_batch_sizes=[])
curriculum = dict(
    baseline_equivalent_epochs=4.0,
    centered=True,
    equivalent_epochs=4.0,
    preset='etpp',
    stages=[],
    warmup_equivalent_epochs=0.4)
data = dict(
    augmentation=dict(
        color_jitter=0.4,
        flip=True,
        max_magnitude=9.0,
        min_scale=0.6,
        ramp='none',
        start_min_scale=0.67),
    eval_crop_ratio=0.75,
    image_size=112,
    loading='exact',
    max_bad_fraction=0.01,
    mean=[
        0.5,
        0.5,
        0.5,
    ],
    num_images=4000,
    num_workers=None,
    std=[
        0.25,
        0.25,
        0.25,
    ],
    train='scenes:4000@112,seed=0',
    val='scenes:1000@112,seed=1')
model = dict(
    decoder_depth=1,
    decoder_embed_dim=64,
    decoder_num_heads=4,
    depth=4,
    embed_dim=128,
    hog_cell_size=None,
    in_chans=3,
    init_from=None,
    mask_ratio=0.75,
    norm_pix_loss=True,
    num_heads=4,
    patch_size=8,
    size='tiny',
    target='pixels')
optimizer = dict(
    base_lr=0.004,
    betas=[
        0.9,
        0.95,
    ],
    clip_grad_norm=None,
    eps=1e-08,
    min_lr=0.0,
    weight_decay=0.05)
replay = dict(
    max_memory_gib=None,
    mode='off',
    on_excess='refuse',
    refill='exact',
    stages=[])
run = dict(
    activation_checkpointing=False,
    compile=False,
    keep_checkpoints=2,
    knn_interval=0,
    knn_max_images=1000,
    log_interval=20,
    max_skipped_steps=0,
    picture_interval=0,
    precision='auto',
    save_interval=500,
    seed=0)
