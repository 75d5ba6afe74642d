"""Base of the golden classifications: the model of pretrain.py on labelled scenes."""

data = {
    "train": "scenes:40@32,seed=3",
    "val": "scenes:100@32,seed=4",
    "image_size": 32,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "num_workers": 0,
}
model = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
run = {"seed": 1, "precision": "fp32"}
