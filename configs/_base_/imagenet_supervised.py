"""Base: EfficientTrain++ on ImageNet-1K with labels, 200 equivalent epochs against 300 at full size (arXiv 2405.08768).

These values of the authors' released code are the same for all models: AdamW, lr 4e-3 at 4096 images, weight decay 0.05,
mixup 0.8, cutmix 1.0, erasing 0.25, smoothing 0.1, RandAugment of magnitude 0 to 9, one step per tenth of the compute.
The configs add the model, its list of bandwidths, drop path, clipping, moving average and precision.

Micro batch: `micro_batch_size` gives the published images per GPU of 24 GB in all stages. Lower it for less memory.
Warm-up: 20 real epochs, which are 3.67 equivalent epochs at 96 px (10.2 at ConvNeXt's 160 px); DeiT: 20% of the compute.
Learning rate: one cosine over the compute. The released code starts its cosine again at each tenth, so for all models but
DeiT its lr jumps up where the bandwidth changes: from 0.918 to 0.941 of the peak at 20%, from 0.378 to 0.413 at 60%.
Weight decay: as in timm, not on Swin's relative-position tables; the released code decays them.
Drop path: the rates are those of 200 equivalent epochs and scale with the budget, as released.
The baseline of the tables is the same recipe at 224 px for 300 epochs. The command is in each config. Its drop path is not
scaled (model.drop_path_epochs=300), and its warm-up is 20 epochs (DeiT: 60).
Other budgets: --cfg-options curriculum.equivalent_epochs=100; published for DeiT and Swin: 100, 150, 200 and 300.
Published numbers are top-1 in percent from Table 7 of the paper; its wall times are on its own machines.
"""

_base_ = "./imagenet.py"

model = dict(drop_path_epochs=200)
curriculum = dict(
    preset="etpp", equivalent_epochs=200, baseline_equivalent_epochs=300, warmup_equivalent_epochs=3.67
)
batch = dict(global_batch_size=4096, micro_batch_size=128)
optimizer = dict(name="adamw", base_lr=2.5e-4, min_lr=1e-6, weight_decay=0.05, betas=(0.9, 0.999))
regularization = dict(mixup=0.8, cutmix=1.0, label_smoothing=0.1, erasing=0.25)
run = dict(save_interval=1000, log_interval=50)
