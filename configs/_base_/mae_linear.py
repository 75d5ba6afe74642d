"""Base: linear probe with the MAE paper's recipe (arXiv 2111.06377, appendix A.2).

The paper probes the cls token: model.pool = "token". It crops from 8% of the area: data.augmentation.min_scale = 0.08.
"""

protocol = "linear_probe"
curriculum = dict(preset="constant", equivalent_epochs=90, warmup_equivalent_epochs=10)
batch = dict(global_batch_size=16384)
optimizer = dict(name="lars", base_lr=0.1, weight_decay=0.0, momentum=0.9, trust_coefficient=0.001)
