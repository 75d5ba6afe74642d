"""ViTDet's schedule: 184,375 steps of 64 images (100 epochs of COCO), AdamW, layer decay, mixed precision."""

max_iters = 184375
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=5000)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=max_iters, milestones=[163889, 177546], gamma=0.1),
]
optim_wrapper = dict(
    type="AmpOptimWrapper",
    constructor="LayerDecayConstructor",
    paramwise_cfg=dict(layer_decay=0.7),
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
)
auto_scale_lr = dict(enable=True, base_batch_size=64)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
