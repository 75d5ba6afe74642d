"""The resolved config of this run."""

batch = dict(global_batch_size=64, micro_batch_size=None)
curriculum = dict(
    baseline_equivalent_epochs=120.0,
    centered=True,
    equivalent_epochs=30.0,
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
    eval_crop_ratio=0.75,
    image_size=64,
    max_bad_fraction=0.01,
    mean=[
        0.5,
        0.5,
        0.5,
    ],
    num_images=6000,
    num_workers=0,
    std=[
        0.25,
        0.25,
        0.25,
    ],
    train='work_dirs/transfer/scenes128/train',
    val='work_dirs/transfer/scenes128/val')
model = dict(
    decoder_depth=2,
    decoder_embed_dim=96,
    decoder_num_heads=4,
    depth=4,
    embed_dim=128,
    in_chans=3,
    init_from=None,
    mask_ratio=0.75,
    norm_pix_loss=True,
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
    knn_max_images=1000,
    log_interval=20,
    max_skipped_steps=0,
    picture_interval=0,
    precision='bf16',
    save_interval=500,
    seed=0)
