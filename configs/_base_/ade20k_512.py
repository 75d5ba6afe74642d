"""ADE20K, 150 classes, crops of 512 x 512. Batch 16 on 8 GPUs."""

_base_ = ["mmseg::_base_/datasets/ade20k.py"]

data_root = "{{$MAE_ET_ADE20K:data/ade/ADEChallengeData2016}}"
train_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
auto_scale_lr = dict(enable=True, base_batch_size=16)
