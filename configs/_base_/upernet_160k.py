"""The schedule of UperNet on ADE20K: 160,000 steps of 16 images, AdamW, layer decay, mixed precision."""

max_iters = 160000
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=16000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=max_iters, by_epoch=False),
]
optim_wrapper = dict(
    type="AmpOptimWrapper",
    constructor="LayerDecayConstructor",
    paramwise_cfg=dict(layer_decay=0.65),
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
