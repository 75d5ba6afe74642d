"""Base: fine-tuning of ImageNet-22K models on ImageNet-1K, 30 epochs at 224 px: ConvNeXt's own code, used by EfficientTrain++.

At 384 px: --cfg-options data.image_size=384 data.eval_crop_ratio=1.0 batch.micro_batch_size=16
The head starts from the rows of the 1,000 synsets among those of the file. One synset, n04399382 (index 850), is not in
ImageNet-22K: its row starts from the mean row. ConvNeXt's own code starts a new head, scaled by 0.001.
"""

_base_ = "./imagenet.py"

curriculum = dict(
    preset="constant", equivalent_epochs=30, baseline_equivalent_epochs=30, warmup_equivalent_epochs=0
)
batch = dict(global_batch_size=512, micro_batch_size=64)
optimizer = dict(name="adamw", base_lr=2.5e-5, min_lr=1e-6, weight_decay=1e-8, betas=(0.9, 0.999))
regularization = dict(mixup=0.0, cutmix=0.0, label_smoothing=0.1, erasing=0.25)
run = dict(save_interval=1000, log_interval=50)
