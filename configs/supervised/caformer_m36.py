"""CAFormer-M36 on ImageNet-1K under EfficientTrain++, 200 equivalent epochs.

Command:  torchrun --nproc_per_node 8 -m mae_et supervised caformer_m36
          Baseline: add --cfg-options curriculum.preset=constant curriculum.equivalent_epochs=300
          curriculum.warmup_equivalent_epochs=20 model.drop_path_epochs=300
Hardware: written for 8 GPUs; accumulation follows for other numbers. Not run by this project: no hours.
Expected: 85.0 top-1, 84.9 of the baseline; 1.51x faster by compute, 1.58x by wall time (paper).
Source:   EfficientTrain++ does not release this recipe. LAMB, lr 8e-3 at 4096 images, min_lr, drop path and dropout of the
          head are those of CAFormer's own code. The other values and the list of bandwidths are the general ones of the base.
          Clipping at 1.0 is the default of LAMB. Micro batch and precision are ours. timm's dropout is before the hidden layer
          of the head, that of CAFormer's own code after it.
"""

_base_ = "../_base_/imagenet_supervised.py"

model = dict(name="caformer_m36", options=dict(drop_rate=0.4), drop_path_rate=0.4)
curriculum = dict(published_speedup=1.51)
optimizer = dict(name="lamb", base_lr=5e-4, min_lr=1e-5, eps=1e-6, clip_grad_norm=1.0)
