"""Demo: a small MAE on generated scenes, under the EfficientTrain++ curriculum.

Command:  make demo   (or: python tools/pretrain.py configs/pretrain/demo.py)
Hardware: two CPU cores, about 3 minutes.
Expected: the loss falls to a third, the reconstructions take shape, and the kNN accuracy of the features (10 classes) rises
          well above that of the untrained network. For ten minutes more: --cfg-options curriculum.equivalent_epochs=60.
Source:   ours; sized for a first look. Targets are raw pixels, because their reconstructions show what was learned.
"""

_base_ = "../_base_/scenes.py"

model = dict(norm_pix_loss=False, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=4)
curriculum = dict(preset="etpp", equivalent_epochs=20, baseline_equivalent_epochs=80, warmup_equivalent_epochs=1)
batch = dict(global_batch_size=64)
optimizer = dict(base_lr=3e-3)
run = dict(log_interval=20, save_interval=500)
