"""The resolved config of this run."""

backbone = 'mae_constant_20e_s2/backbone.safetensors'
batch = dict(
    early_large_batch=dict(
        max_global_batch_size=None, max_lr=None, rule='none'),
    global_batch_size=128,
    micro_batch_size=None,
    micro_batch_sizes=[])
curriculum = dict(
    baseline_equivalent_epochs=3.0,
    budget_hours=None,
    centered=True,
    equivalent_epochs=3.0,
    file=None,
    preset='constant',
    stages=[],
    warmup_equivalent_epochs=0.3)
data = dict(
    augmentation=dict(
        color_jitter=0.4,
        flip=True,
        max_magnitude=9.0,
        min_scale=0.35,
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
    num_workers=0,
    remote_cache_gib=100.0,
    shuffle_block=1,
    std=[
        0.229,
        0.224,
        0.225,
    ],
    train='shards/train/train.raw.json',
    train_weights=[],
    val='shards/val/val.raw.json',
    value_range=None)
eval_interval = None
knn = dict(
    ks=[
        10,
        20,
        100,
        200,
    ], temperature=0.07)
labels = dict(fraction=None, images_per_class=None, num_draws=5)
model = dict(
    depth=4,
    drop_path_rate=0.0,
    embed_dim=128,
    head_init_std=2e-05,
    in_chans=3,
    mlp='gelu',
    mlp_ratio=None,
    num_heads=4,
    num_registers=0,
    patch_size=8,
    pool='avg',
    rotary_positions=False,
    size='tiny')
optimizer = dict(
    base_lr=0.002,
    betas=[
        0.9,
        0.999,
    ],
    clip_grad_norm=None,
    eps=1e-08,
    layer_decay=0.75,
    min_lr=1e-06,
    momentum=0.9,
    name='adamw',
    trust_coefficient=0.001,
    weight_decay=0.05)
protocol = 'finetune'
regularization = dict(
    cutmix=0.0, ema_decay=None, erasing=0.0, label_smoothing=0.1, mixup=0.0)
replay = dict(max_memory_gib=None, mode='off', stages=[])
run = dict(
    activation_checkpointing=False,
    compile=False,
    data_parallel_shard_degree=None,
    gradient_dtype='fp32',
    keep_checkpoints=2,
    log_interval=50,
    loggers=[
        'tensorboard',
    ],
    max_skipped_steps=0,
    parallel='ddp',
    precision='bf16',
    save_interval=100000,
    seed=2)
sweep = dict(
    epochs=50,
    lrs=[
        0.001,
        0.003,
        0.01,
        0.03,
        0.1,
        0.3,
        1.0,
    ],
    selection_fraction=0.2,
    weight_decays=[
        0.0,
        0.0001,
        0.001,
    ])
