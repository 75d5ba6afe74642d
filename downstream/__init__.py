"""Plug-ins for mmdetection and mmsegmentation; a config gets them with `custom_imports = dict(imports=["downstream"])`.

The backbones need only mmengine and timm, so they also work without the mm packages.
"""

from downstream.compat.channels import allow_any_channels
from downstream.compat.imgaug import stand_in_for_imgaug
from downstream.compat.operators import provide_operators

provide_operators()  # before anything imports mmcv.ops
allow_any_channels()
stand_in_for_imgaug()  # before anything imports mmdet.datasets

from downstream.backbones.timm_features import TimmFeatures  # noqa: E402
from downstream.backbones.vit_det import SimpleFeaturePyramid, ViTDet  # noqa: E402
from downstream.backbones.vit_seg import ViTSeg  # noqa: E402
from downstream.datasets.image_array import LoadImageArray  # noqa: E402
from downstream.layer_decay import LayerDecayConstructor  # noqa: E402

__all__ = ["LayerDecayConstructor", "LoadImageArray", "SimpleFeaturePyramid", "TimmFeatures", "ViTDet", "ViTSeg"]
