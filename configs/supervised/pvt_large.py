"""PVT-Large (v1) on ImageNet-1K under EfficientTrain++, 200 equivalent epochs.

Command:  torchrun --nproc_per_node 8 -m mae_et supervised pvt_large
          Baseline: add --cfg-options curriculum.preset=constant curriculum.equivalent_epochs=300
          curriculum.warmup_equivalent_epochs=5 model.drop_path_epochs=300
Hardware: written for 8 GPUs; accumulation follows for other numbers. Not run by this project: no hours.
Expected: 82.4 top-1, 82.3 of the baseline; 1.51x faster by compute, 1.48x by wall time (paper).
Source:   EfficientTrain++ releases no PVT. Batch, lr, warm-up of 5 epochs, drop path, clipping and repeated augmentation are
          those of PVT's own code. The other values and the list of bandwidths are the general ones of the base. Micro batch
          and precision are ours.
"""

_base_ = "../_base_/imagenet_supervised.py"

data = dict(num_repeats=3)
model = dict(name="pvt_large", drop_path_rate=0.3)
curriculum = dict(warmup_equivalent_epochs=0.92, published_speedup=1.51)
batch = dict(global_batch_size=1024)
optimizer = dict(clip_grad_norm=1.0)
