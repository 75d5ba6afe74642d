"""The resolved config of this run."""

batch = dict(
    early_large_batch=dict(
        max_global_batch_size=None, max_lr=None, rule='none'),
    global_batch_size=64,
    micro_batch_size=None,
    micro_batch_sizes=[])
curriculum = dict(
    baseline_equivalent_epochs=8.0,
    centered=True,
    equivalent_epochs=5.33,
    preset='etpp',
    published_speedup=None,
    stages=[],
    warmup_equivalent_epochs=0.2665)
data = dict(
    augmentation=dict(
        color_jitter=0.0,
        flip=True,
        max_magnitude=9.0,
        min_scale=0.25,
        ramp='none',
        start_min_scale=0.67),
    eval_crop_ratio=0.875,
    image_size=112,
    loading='fast',
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
    std=[
        0.229,
        0.224,
        0.225,
    ],
    train='data/imagenette/train',
    val='data/imagenette/val',
    value_range=None)
eval_interval = 358
model = dict(
    drop_path_epochs=None,
    drop_path_rate=0.0,
    in_chans=3,
    init_from=None,
    name='convnext_atto',
    options=dict(depths=[
        1,
        1,
        3,
        1,
    ], dims=[
        32,
        64,
        128,
        256,
    ]))
optimizer = dict(
    base_lr=0.004,
    betas=[
        0.9,
        0.999,
    ],
    clip_grad_norm=None,
    eps=1e-08,
    layer_decay=1.0,
    min_lr=1e-06,
    name='adamw',
    weight_decay=0.05)
regularization = dict(
    cutmix=0.0, ema_decay=None, erasing=0.0, label_smoothing=0.1, mixup=0.0)
replay = dict(max_memory_gib=None, mode='off', stages=[])
run = dict(
    activation_checkpointing=False,
    compile=False,
    keep_checkpoints=2,
    log_interval=20,
    max_skipped_steps=0,
    precision='bf16',
    save_interval=200,
    seed=0)
