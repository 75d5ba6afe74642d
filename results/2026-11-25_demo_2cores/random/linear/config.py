"""The resolved config of this run."""

backbone = None
batch = dict(
    early_large_batch=dict(
        max_global_batch_size=None, max_lr=None, rule='none'),
    global_batch_size=64,
    micro_batch_size=None,
    micro_batch_sizes=[])
curriculum = dict(
    baseline_equivalent_epochs=2.0,
    centered=True,
    equivalent_epochs=2.0,
    preset='constant',
    stages=[],
    warmup_equivalent_epochs=0.2)
data = dict(
    augmentation=dict(
        color_jitter=0.4,
        flip=True,
        max_magnitude=9.0,
        min_scale=0.4,
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
    num_workers=0,
    std=[
        0.25,
        0.25,
        0.25,
    ],
    train='scenes:4000@112,seed=0',
    val='scenes:1000@112,seed=1')
eval_interval = 1000
knn = dict(
    ks=[
        10,
        20,
        100,
        200,
    ], temperature=0.07)
model = dict(
    depth=4,
    drop_path_rate=0.0,
    embed_dim=128,
    head_init_std=2e-05,
    in_chans=3,
    num_heads=4,
    patch_size=8,
    pool='avg',
    size='tiny')
optimizer = dict(
    base_lr=0.4,
    betas=[
        0.9,
        0.95,
    ],
    clip_grad_norm=None,
    eps=1e-08,
    layer_decay=1.0,
    min_lr=0.0,
    momentum=0.9,
    name='adamw',
    trust_coefficient=0.001,
    weight_decay=0.0)
protocol = 'linear_probe'
regularization = dict(
    cutmix=1.0, ema_decay=None, erasing=0.25, label_smoothing=0.1, mixup=0.8)
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
    save_interval=1000,
    seed=0)
