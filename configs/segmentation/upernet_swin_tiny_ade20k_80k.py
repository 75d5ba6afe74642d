"""UperNet with Swin-T on ADE20K, 512 px, 80,000 steps.

Command:  torchrun --nproc_per_node 8 tools/train.py configs/segmentation/upernet_swin_tiny_ade20k_80k.py \\
              --backbone FILE --launcher pytorch
Hardware: 8 GPUs with 2 images each; the learning rate scales with the batch. Not run by us, so no hours are given.
Expected: 43.3 mIoU; from an EfficientTrain++ backbone 44.1 (EfficientTrain++ paper).
Source:   the recipe of 160,000 steps, with the schedule cut in half. Data: MAE_ET_ADE20K.
"""

_base_ = ["./upernet_swin_tiny_ade20k_160k.py"]

max_iters = 80000
train_cfg = dict(max_iters=max_iters, val_interval=8000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=max_iters, by_epoch=False),
]
