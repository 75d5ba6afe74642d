"""Padding that keeps the size of the image. Needs mmdet."""

from __future__ import annotations

from typing import Any

from mmdet.datasets.transforms import Pad
from mmdet.registry import TRANSFORMS


@TRANSFORMS.register_module()
class PadKeepingImageSize(Pad):
    """mmdetection's Pad, but `img_shape` stays the size of the image; `pad_shape` is that of the padded one.

    mmdetection sets `img_shape` to the padded size. Then predicted boxes are clipped to the padded image, may lie wholly in
    the padding, and pasting their masks fails on a CPU.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Pads image, masks and segmentation map."""
        size = results["img_shape"]
        results = super().transform(results)
        results["img_shape"] = size
        return results
