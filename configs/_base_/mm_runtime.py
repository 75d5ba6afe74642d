"""The common runtime of detection and segmentation: our plug-ins, TensorBoard, pictures of predictions, the seed."""

custom_imports = dict(imports=["downstream"], allow_failed_imports=False)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
randomness = dict(seed=0)
vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
log_level = "INFO"
load_from = None
resume = False
