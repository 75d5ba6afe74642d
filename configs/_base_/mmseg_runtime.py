"""The runtime of segmentation."""

_base_ = ["./mm_runtime.py"]

default_scope = "mmseg"
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="CheckpointHook", by_epoch=False, interval=16000, max_keep_ckpts=2, save_last=True,
        save_best="mIoU", rule="greater",
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook", draw=True, interval=500),
)
visualizer = dict(type="SegLocalVisualizer", vis_backends=_base_.vis_backends)
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=False)
