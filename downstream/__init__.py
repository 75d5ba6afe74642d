"""Plug-ins for mmdetection and mmsegmentation; a config gets them all through `custom_imports = dict(imports=["downstream"])`.

The backbones need mmengine and timm alone, so they also load, and are tested, where the mm packages are absent.
"""

from downstream.ops import provide_operators

provide_operators()  # before anything imports mmcv.ops
