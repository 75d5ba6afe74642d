"""The resolved config of this run."""

backbone = None
batch = dict(global_batch_size=64, micro_batch_size=None)
curriculum = dict(
    baseline_equivalent_epochs=3.0,
    centered=True,
    equivalent_epochs=3.0,
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
    eval_crop_ratio=1.0,
    image_size=32,
    max_bad_fraction=0.01,
    mean=[
        0.4914,
        0.4822,
        0.4465,
    ],
    num_images=10000,
    num_workers=0,
    std=[
        0.247,
        0.2435,
        0.2616,
    ],
    train='CIFAR10/train-000000.tar.gz',
    val='CIFAR10/test-000000.tar.gz')
eval_interval = 10000
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
    patch_size=4,
    pool='avg',
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
run = dict(
    activation_checkpointing=False,
    compile=False,
    keep_checkpoints=2,
    knn_interval=0,
    knn_max_images=5000,
    log_interval=50,
    max_skipped_steps=0,
    picture_interval=0,
    precision='bf16',
    save_interval=500,
    seed=0)
