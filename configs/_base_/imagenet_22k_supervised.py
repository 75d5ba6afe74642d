"""Base: EfficientTrain++ on ImageNet-22K (arXiv 2405.08768), against 90 epochs at full size. No validation images.

Set MAE_ET_IMAGENET22K to the folder that holds one subfolder per synset, or pass --cfg-options data.train=...
Classes: the 21,841 of the fall 2011 release, in the published order; missing ones keep their numbers, others are refused.
The winter 2021 release, the only one that is offered now, has 19,167 and no published list:
--cfg-options data.classes=None data.num_classes=19167 data.num_images=None, with --dataset-size for `mae-et plan`.

The authors release neither code nor recipe of this pre-training. Epochs and budgets are theirs: 60, 45 and 30 equivalent
epochs cost 2/3, 1/2 and 1/3 of the baseline. The other values are those of the models' own 22K trainings, or ours where a
config says so. Drop path is not scaled with the budget. Published numbers are top-1 in percent on ImageNet-1K at 224/384 px
after fine-tuning, and GPU-days on RTX 3090, from Tables 12 and 13 of the paper.
"""

data = dict(
    train="{{$MAE_ET_IMAGENET22K:data/imagenet22k}}",
    classes="imagenet-22k",
    num_images=14197122,
    loading="fast",
)
curriculum = dict(preset="etpp", baseline_equivalent_epochs=90)
batch = dict(global_batch_size=4096)
optimizer = dict(name="adamw", base_lr=2.5e-4, min_lr=1e-6, weight_decay=0.05, betas=(0.9, 0.999))
regularization = dict(mixup=0.8, cutmix=1.0, label_smoothing=0.1, erasing=0.25)
run = dict(save_interval=1000, log_interval=50)
