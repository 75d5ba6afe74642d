"""The runtime of detection."""

_base_ = ["./mm_runtime.py"]

default_scope = "mmdet"
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="CheckpointHook", by_epoch=False, interval=5000, max_keep_ckpts=2, save_last=True,
        save_best="coco/bbox_mAP", rule="greater",
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="DetVisualizationHook", draw=True, interval=500),
)
visualizer = dict(type="DetLocalVisualizer", vis_backends=_base_.vis_backends)
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=False)
