"""Applies the filters of a config to normalized images.

The filter comes after the crop to the bandwidth and after the normalization. Both orders of crop and filter give the same
image, because the crop keeps the frequencies below B/2 as they are; this one filters fewer pixels. A low-pass filter
commutes with the normalization; a high-pass filter after it shows images around the mean colour instead of black.
"""

from __future__ import annotations

from torch import Tensor

from mae_et.config.filters import FilterConfig, TrainFilterConfig
from mae_et.frequency import high_pass, low_pass
from mae_et.models.sizes import Size


def filtered(images: Tensor, settings: FilterConfig, image_size: Size) -> Tensor:
    """Filters images of any bandwidth.

    Args:
        images: [n, C, h, w], normalized.
        settings: the filter.
        image_size: px, of the run; the radius follows from it, because a crop keeps the cycles per image. Of a rectangle the
            shorter side counts.
    """
    function = low_pass if settings.kind == "low_pass" else high_pass
    return function(images, settings.radius_at(image_size), settings.shape)


def filtered_for_training(
    images: Tensor, settings: TrainFilterConfig, image_size: Size, compute_fraction: float
) -> Tensor:
    """Filters images if the filter is on at this fraction of the compute; returns them as they are if not."""
    is_on = settings.kind != "none" and compute_fraction < settings.until
    return filtered(images, settings, image_size) if is_on else images
