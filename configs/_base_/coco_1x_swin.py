"""Base: COCO 2017, 1x, with the optimizer of Swin's detectors. Norms and bias tables do not decay; biases neither (ours)."""

_base_ = ["./coco_1x.py"]

optim_wrapper = dict(
    paramwise_cfg=dict(no_decay=("relative_position_bias_table",)),
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
