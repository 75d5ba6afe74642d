"""The resolved config of this run."""

batch = dict(global_batch_size=128, micro_batch_size=None)
curriculum = dict(
    baseline_equivalent_epochs=2.4,
    centered=True,
    equivalent_epochs=2.4,
    preset='constant',
    stages=[],
    warmup_equivalent_epochs=0.2)
data = dict(
    augmentation=dict(
        color_jitter=0.4,
        flip=True,
        max_magnitude=9.0,
        min_scale=0.2,
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
    num_images=50000,
    num_workers=0,
    std=[
        0.247,
        0.2435,
        0.2616,
    ],
    train='CIFAR10/train-{000000..000004}.tar.gz',
    val='CIFAR10/test-000000.tar.gz')
model = dict(
    decoder_depth=1,
    decoder_embed_dim=64,
    decoder_num_heads=4,
    depth=4,
    embed_dim=128,
    in_chans=3,
    init_from=None,
    mask_ratio=0.75,
    norm_pix_loss=True,
    num_heads=4,
    patch_size=4,
    size='tiny')
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
run = dict(
    activation_checkpointing=False,
    compile=False,
    keep_checkpoints=2,
    knn_interval=156,
    knn_max_images=3000,
    log_interval=50,
    max_skipped_steps=0,
    picture_interval=0,
    precision='bf16',
    save_interval=500,
    seed=2)
