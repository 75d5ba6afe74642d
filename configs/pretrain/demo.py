"""Demo: a tiny MAE on generated scenes, under the EfficientTrain++ curriculum.

Command:  make demo   (or: python tools/pretrain.py configs/pretrain/demo.py)
Hardware: two CPU cores, about 3 minutes.
Expected: the loss falls, the reconstructions take shape, the kNN accuracy of the features rises well above the untrained.
Ours:     everything here; sized for a first look, not taken from a paper.
"""

data = dict(
    train="scenes:4000@64,seed=0",
    val="scenes:500@64,seed=1",
    num_images=4000,
    image_size=64,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
model = dict(size="tiny", patch_size=8)
curriculum = dict(preset="etpp", equivalent_epochs=16, baseline_equivalent_epochs=64, warmup_equivalent_epochs=1)
batch = dict(global_batch_size=64)
optimizer = dict(base_lr=1.2e-3)
run = dict(log_interval=20, save_interval=200)
