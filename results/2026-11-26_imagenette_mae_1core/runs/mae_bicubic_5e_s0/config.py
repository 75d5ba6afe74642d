"""The resolved config of this run."""

batch = dict(
    early_large_batch=dict(
        max_global_batch_size=None, max_lr=None, rule='none'),
    global_batch_size=128,
    micro_batch_size=None,
    micro_batch_sizes=[])
curriculum = dict(
    baseline_equivalent_epochs=20.0,
    budget_hours=None,
    centered=True,
    equivalent_epochs=5.0,
    file=None,
    preset='etpp',
    stages=[],
    warmup_equivalent_epochs=0.25)
data = dict(
    augmentation=dict(
        color_jitter=0.4,
        flip=True,
        max_magnitude=9.0,
        min_scale=0.2,
        ramp='none',
        start_min_scale=0.67),
    eval_crop_ratio=0.875,
    filter=dict(kind='none', radius=40.0, shape='circle', until=1.0),
    image_size=112,
    loading='exact',
    max_bad_fraction=0.01,
    max_image_pixels=67108864,
    max_shards=100000,
    max_unpack_ratio=30.0,
    mean=[
        0.485,
        0.456,
        0.406,
    ],
    num_images=9469,
    num_repeats=1,
    num_workers=None,
    remote_cache_gib=100.0,
    shuffle_block=1,
    std=[
        0.229,
        0.224,
        0.225,
    ],
    train='data/imagenette/train',
    train_weights=[],
    val='data/imagenette/val',
    val_filters=[],
    value_range=None)
model = dict(
    adapt_channels='none',
    decoder_depth=1,
    decoder_embed_dim=64,
    decoder_num_heads=4,
    depth=4,
    ema_decay=None,
    embed_dim=128,
    hog_cell_size=None,
    in_chans=3,
    init_from=None,
    learnt_positions=False,
    mask_kind='random',
    mask_ratio=0.75,
    norm_pix_loss=True,
    num_heads=4,
    num_registers=0,
    patch_size=8,
    size='tiny',
    target='pixels')
optimizer = dict(
    base_lr=0.002,
    betas=[
        0.9,
        0.95,
    ],
    clip_grad_norm=None,
    eps=1e-08,
    min_lr=0.0,
    weight_decay=0.05)
replay = dict(max_memory_gib=None, mode='off', stages=[])
run = dict(
    activation_checkpointing=False,
    compile=False,
    data_parallel_shard_degree=None,
    gradient_dtype='fp32',
    keep_checkpoints=2,
    knn_interval=None,
    knn_max_images=4000,
    label_free_interval=None,
    log_interval=50,
    loggers=[
        'tensorboard',
    ],
    max_skipped_steps=0,
    num_pictures=6,
    parallel='ddp',
    picture_channels=None,
    picture_interval=None,
    precision='bf16',
    save_interval=200,
    seed=0)
