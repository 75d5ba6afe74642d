"""A small MAE on 1000 ImageNet images (one of each class), under the EfficientTrain++ curriculum.

Command:  MAE_ET_IMAGENET_MINI=/data/imagenet_mini python tools/pretrain.py configs/pretrain/imagenet_mini.py
Hardware: two CPU cores, about 3 minutes.
Expected: the loss falls and the reconstructions take shape; see results/. It says nothing about accuracy.
Source:   ours. 64 px and patches of 8 px keep it small; the bandwidths 96, 160, 224 of etpp become 24, 48, 64.
"""

data = dict(
    train="{{$MAE_ET_IMAGENET_MINI:data/imagenet_mini}}/train",
    num_images=1000,
    image_size=64,
)
model = dict(
    size="tiny", patch_size=8, norm_pix_loss=False,
    embed_dim=128, depth=4, num_heads=4, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=4,
)
curriculum = dict(preset="etpp", equivalent_epochs=60, baseline_equivalent_epochs=240, warmup_equivalent_epochs=3)
batch = dict(global_batch_size=64)
optimizer = dict(base_lr=3e-3)
run = dict(precision="fp32", save_interval=500, log_interval=20)
