"""Filters and power by radial band, in the discrete Fourier spectrum of an image.

The radius of a frequency (ky, kx) of an H x W image is hypot(ky min(H, W) / H, kx min(H, W) / W): cycles per shorter side of
the image. For a square image it is the distance in px from the centre of the image's own spectrum. The Nyquist limit of the
axes has radius min(H, W) / 2, and the corners of the spectrum reach sqrt(2) times as far.

Shapes: ... any leading dimensions, H x W px, K bands.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mae_et.lowfreq import FLOAT_DTYPES

SHAPES = ("circle", "square")
TOLERANCE = 1e-9  # relative, so that a frequency on the rim stays inside in spite of rounding


def low_pass(images: Tensor, radius: float, shape: str = "circle") -> Tensor:
    """Sets all frequencies beyond a radius to zero. The size of the images and their means do not change.

    Args:
        images: [..., H, W] float16, bfloat16, float32 or float64; computed in float32 or better, also under autocast.
        radius: largest radius that is kept, cycles per shorter side, above 0.
        shape: "circle" keeps hypot(ky, kx) <= radius, "square" keeps max(|ky|, |kx|) <= radius.
    Returns:
        [..., H, W], dtype of images. Values may leave the input's range (ringing); they are not clipped.
    Raises:
        ValueError: if images are not floating point or not at least 2-D, or radius or shape is not allowed.
    Source: EfficientTrain (arXiv 2211.09703) uses low-pass filters in its discovery experiments.
    """
    _check(images)
    if shape not in SHAPES:
        raise ValueError(f"shape = {shape!r} must be one of {', '.join(map(repr, SHAPES))}")
    if not 0 < radius < math.inf:
        raise ValueError(f"radius = {radius!r} must be a finite number above 0")
    height, width = images.shape[-2:]
    with torch.autocast(images.device.type, enabled=False):
        pixels = images if images.dtype == torch.float64 else images.float()
        kept = _mask(height, width, float(radius), shape, pixels.device)
        return torch.fft.irfft2(torch.fft.rfft2(pixels) * kept, s=(height, width)).to(images.dtype)


def high_pass(images: Tensor, radius: float, shape: str = "circle") -> Tensor:
    """Returns what `low_pass` removes: images - low_pass(images). The mean of each image becomes 0.

    Args, returns and raises: as for `low_pass`.
    """
    return images - low_pass(images, radius, shape)


def band_power(images: Tensor, num_bands: int) -> Tensor:
    """Returns the power of images by radial band; its sum over the bands is the mean square of the pixels (Parseval).

    Args:
        images: as for `low_pass`.
        num_bands: K; band k holds the radii from k to k + 1 in units of min(H, W) / (2 K). Band 0 holds the mean. The last
            band also holds the corners of the spectrum, beyond the Nyquist limit of the axes.
    Returns:
        [..., K], float32 or float64.
    Raises:
        ValueError: if images are not floating point or not at least 2-D, or K is not from 1 to min(H, W) / 2.
    """
    _check(images)
    height, width = images.shape[-2:]
    if not 1 <= num_bands <= min(height, width) // 2:
        raise ValueError(
            f"num_bands = {num_bands} must be from 1 to {min(height, width) // 2}: a band needs at least one frequency"
        )
    with torch.autocast(images.device.type, enabled=False):
        pixels = images if images.dtype == torch.float64 else images.float()
        spectrum = torch.fft.rfft2(pixels, norm="forward")
        power = spectrum.real**2 + spectrum.imag**2
        return power.flatten(-2) @ _band_table(height, width, num_bands, power.dtype, power.device)


def _check(images: Tensor) -> None:
    if images.dtype not in FLOAT_DTYPES:
        raise ValueError(f"images are {images.dtype}; convert them to a floating-point type first, e.g. images.float()")
    if images.ndim < 2:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected [..., H, W]")


def _frequencies(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns |ky| [H, 1] and |kx| [1, W // 2 + 1] of the half spectrum of `rfft2`, cycles per shorter side, float64."""
    rows = torch.fft.fftfreq(height, dtype=torch.float64, device="cpu").abs() * min(height, width)
    columns = torch.fft.rfftfreq(width, dtype=torch.float64, device="cpu").abs() * min(height, width)
    return rows[:, None], columns[None]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # tables made under it could not be used in training
def _mask(height: int, width: int, radius: float, shape: str, device: torch.device) -> Tensor:
    rows, columns = _frequencies(height, width)
    distance = torch.hypot(rows, columns) if shape == "circle" else torch.maximum(rows, columns)
    return (distance <= radius * (1 + TOLERANCE)).to(device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _band_table(height: int, width: int, num_bands: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[H (W // 2 + 1), K]: how often the half spectrum's frequency stands for one of the whole spectrum, in its band."""
    rows, columns = _frequencies(height, width)
    band = (torch.hypot(rows, columns) * (1 + TOLERANCE) * 2 * num_bands / min(height, width)).long()
    # All columns but the first, and the last of an even width, also stand for their mirror image.
    count = torch.full((width // 2 + 1,), 2, dtype=torch.int64, device="cpu")
    count[0] = 1
    if width % 2 == 0:
        count[-1] = 1
    table = torch.nn.functional.one_hot(band.clamp(max=num_bands - 1), num_bands) * count[:, None]
    return table.flatten(0, 1).to(device, dtype)
