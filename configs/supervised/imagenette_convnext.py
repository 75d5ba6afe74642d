"""A small ConvNeXt on Imagenette under the curriculum.

Command:  MAE_ET_IMAGENETTE=/data/imagenette python tools/supervised.py configs/supervised/imagenette_convnext.py
          The run to compare with: --cfg-options curriculum.preset=constant
Hardware: one CPU core with bf16 instructions; results/ lists the minutes.
Expected: see results/.
Source:   ours; the recipe is in ../_base_/imagenette_supervised.py.
"""

_base_ = "../_base_/imagenette_supervised.py"

model = dict(name="convnext_atto", options=dict(dims=[32, 64, 128, 256], depths=[1, 1, 3, 1]))
