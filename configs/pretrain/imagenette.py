"""A small MAE on Imagenette (9,469 photos of 10 classes) with the grids of the paper: 6, 10 and 14 patches a side.

Command:  MAE_ET_IMAGENETTE=/data/imagenette python tools/pretrain.py configs/pretrain/imagenette.py
          The run to compare with: --cfg-options curriculum.preset=constant
Hardware: one CPU core with bf16 instructions; results/ lists the minutes.
Expected: see results/.
Source:   ours. 112 px with patches of 8 px halve the paper's 224 and 16, so the preset's bandwidths are 48, 80 and 112.
"""

data = dict(
    train="{{$MAE_ET_IMAGENETTE:data/imagenette}}/train",
    val="{{$MAE_ET_IMAGENETTE:data/imagenette}}/val",
    num_images=9469,
    image_size=112,
)
model = dict(
    size="tiny",
    patch_size=8,
    embed_dim=128,
    depth=4,
    num_heads=4,
    mask_ratio=0.75,
    norm_pix_loss=True,
    decoder_embed_dim=64,
    decoder_depth=1,
    decoder_num_heads=4,
)
curriculum = dict(
    preset="etpp", equivalent_epochs=20, baseline_equivalent_epochs=20, warmup_equivalent_epochs=1
)
batch = dict(global_batch_size=128)
optimizer = dict(base_lr=2e-3)
run = dict(precision="bf16", save_interval=200, log_interval=50, knn_max_images=4000)
