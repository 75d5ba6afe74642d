"""Golden pre-training: three stages, every random augmentation on, large steps so that small changes show."""

data = {
    "train": "scenes:20@32,seed=3",
    "image_size": 32,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "augmentation": {"ramp": "randaugment"},
    "num_workers": 0,
}
model = {
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "mask_ratio": 0.5,
}
curriculum = {
    "preset": "custom",
    "stages": [
        {"compute_fraction": 0.2, "bandwidth": 16, "strength": 0.0},
        {"compute_fraction": 0.4, "bandwidth": 24, "strength": 0.5},
        {"compute_fraction": 0.4, "bandwidth": 32, "strength": 1.0},
    ],
    "equivalent_epochs": 3.2,
    "warmup_equivalent_epochs": 0.3,
}
batch = {"global_batch_size": 8, "micro_batch_size": 8}
optimizer = {"base_lr": 0.096, "weight_decay": 2.0}
run = {"seed": 1, "precision": "fp32", "log_interval": 1}
