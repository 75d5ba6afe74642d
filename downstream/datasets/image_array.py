"""Loads images of any number of channels and any number type for mmdet and mmseg."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.registry import TRANSFORMS

from mae_et.data.arrays import ImageArray, decode
from mae_et.data.decoding import MAX_IMAGE_PIXELS, BadImageError, Decoding
from mae_et.errors import DataError


@TRANSFORMS.register_module()
class LoadImageArray:
    """Loads an image as pre-training reads it, in place of LoadImageFromFile.

    Values are scaled to 0 to 255, the unit of `data_preprocessor.mean` and `std`: uint8, or float32 with a value range, whose
    fractions are kept. Three channels are in the order BGR, as mmcv's.

    Args:
        num_channels: `model.in_chans` of the pre-training.
        value_range: its `data.value_range`.
        max_pixels: larger images are refused; of a TIFF file, averaged.
    """

    def __init__(
        self, num_channels: int, value_range: Sequence[float] | None = None, max_pixels: int = MAX_IMAGE_PIXELS
    ) -> None:
        stored = None if value_range is None else (float(value_range[0]), float(value_range[1]))
        self.decoding = Decoding(num_channels, stored, max_pixels, "uint8" if stored is None else "float32")
        self.decoding.check()

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds img [H, W, C], img_shape and ori_shape to the results of a data set.

        Raises:
            DataError: if the image cannot be read.
        """
        try:
            image = decode(results["img_path"], self.decoding)
            pixels = image.read() if isinstance(image, ImageArray) else np.asarray(image)
        except BadImageError as error:
            raise DataError(f"{results['img_path']}: {error}") from error
        if pixels.dtype == np.float32:
            pixels = pixels * np.float32(255)
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if pixels.shape[2] == 3:
            pixels = np.ascontiguousarray(pixels[..., ::-1])
        results["img"], results["img_shape"], results["ori_shape"] = pixels, pixels.shape[:2], pixels.shape[:2]
        return results

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_channels={self.decoding.num_channels}, value_range={self.decoding.value_range})"
        )
