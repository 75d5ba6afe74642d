"""A small ViT on Imagenette under the curriculum.

Command:  MAE_ET_IMAGENETTE=/data/imagenette python tools/supervised.py configs/supervised/imagenette_vit.py
          The run to compare with: --cfg-options curriculum.preset=constant
Hardware: one CPU core with bf16 instructions; results/ lists the minutes.
Expected: see results/.
Source:   ours; the recipe is in ../_base_/imagenette_supervised.py.
"""

_base_ = "../_base_/imagenette_supervised.py"

model = dict(name="vit_tiny_patch16_224", options=dict(embed_dim=128, depth=6, num_heads=4))
