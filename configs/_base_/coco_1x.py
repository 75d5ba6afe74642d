"""Base: COCO 2017, 1x (12 epochs), batch 16 on 8 GPUs, as in mmdetection. Data: MAE_ET_COCO, else data/coco."""

_base_ = [
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "./mmdet_runtime.py",
]

data_root = "{{$MAE_ET_COCO:data/coco}}/"
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
optim_wrapper = dict(constructor="LayerDecayConstructor")
auto_scale_lr = dict(enable=True, base_batch_size=16)
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=1))
log_processor = dict(by_epoch=True)
