"""Base: fine-tuning with the MAE paper's recipe (arXiv 2111.06377, appendix A.2). Layer decay and drop path depend on the size.

The augmentation is set in the configs: data.augmentation = dict(ramp="randaugment", min_scale=0.08, color_jitter=0.0),
which is rand-m9-mstd0.5-inc1.
"""

protocol = "finetune"
curriculum = dict(preset="constant", warmup_equivalent_epochs=5)
batch = dict(global_batch_size=1024)
optimizer = dict(name="adamw", betas=(0.9, 0.999), weight_decay=0.05, min_lr=1e-6)
regularization = dict(mixup=0.8, cutmix=1.0, label_smoothing=0.1, erasing=0.25)
