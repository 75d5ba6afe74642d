"""A tiny MAE on 1000 ImageNet images (one of each class), under the EfficientTrain++ curriculum.

Command:  MAE_ET_IMAGENET_MINI=/data/imagenet_mini python tools/pretrain.py configs/pretrain/imagenet_mini.py
Hardware: two CPU cores; see results/ for minutes.
Expected: the loss falls and the reconstructions take shape; see results/. Nothing can be learnt about accuracy.
Source:   ours. 112 px and patches of 16 px keep it small; etpp's bandwidths 96, 160, 224 become 48, 80, 112.
"""

data = dict(
    train="{{$MAE_ET_IMAGENET_MINI:data/imagenet_mini}}/train",
    num_images=1000,
    image_size=112,
)
model = dict(size="tiny", patch_size=16, norm_pix_loss=False, decoder_depth=2)
curriculum = dict(
    preset="etpp", equivalent_epochs=20, baseline_equivalent_epochs=80, warmup_equivalent_epochs=2
)
batch = dict(global_batch_size=64)
optimizer = dict(base_lr=2e-3)
run = dict(save_interval=200, log_interval=20)
