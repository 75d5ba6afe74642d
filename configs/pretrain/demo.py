"""Demo: a small MAE on generated scenes, under the EfficientTrain++ curriculum.

Command:  make demo   (or: python tools/pretrain.py configs/pretrain/demo.py)
Hardware: two CPU cores, about 2 minutes.
Expected: kNN accuracy (k = 20, ten classes) 23.4% over three seeds, against 17.7% at full size for the same cost; see
          results/2026-11-25_demo_scenes_2cores.
Source:   ours; the geometry and the normalized pixels are the paper's, the size and the budget fit two CPU cores.
"""

_base_ = "../_base_/scenes.py"

model = dict(norm_pix_loss=True, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=4)
# The baseline has the same cost: it is this config with preset="constant".
curriculum = dict(preset="etpp", equivalent_epochs=4, baseline_equivalent_epochs=4, warmup_equivalent_epochs=0.4)
batch = dict(global_batch_size=64)
optimizer = dict(base_lr=4e-3)
run = dict(log_interval=20, save_interval=500, knn_max_images=1000)
