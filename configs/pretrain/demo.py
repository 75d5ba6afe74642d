"""Demo: a small MAE on generated scenes, under the EfficientTrain++ curriculum.

Command:  make demo   (or: python tools/pretrain.py configs/pretrain/demo.py)
Hardware: two CPU cores, about 2 minutes.
Expected: the loss falls from 1.4 to 0.65. Over three seeds, the kNN accuracy (k = 20, ten classes) is 23.4% +- 1.5 and that of
          the linear probe 40.4% +- 2.3. With curriculum.preset=constant at the same cost: 17.7% +- 0.4 and 29.6% +- 0.6.
          Untrained: 14.0% and 29.1%. Record: results/2026-11-25_demo_2cores/README.md.
Source:   ours; the geometry and the normalised pixels are the paper's, the size and the budget fit two CPU cores.
"""

_base_ = "../_base_/scenes.py"

model = dict(norm_pix_loss=True, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=4)
# The baseline has the same cost: it is this config with preset="constant".
curriculum = dict(preset="etpp", equivalent_epochs=4, baseline_equivalent_epochs=4, warmup_equivalent_epochs=0.4)
batch = dict(global_batch_size=64)
optimizer = dict(base_lr=4e-3)
run = dict(precision="fp32", log_interval=20, save_interval=500, knn_max_images=1000)
