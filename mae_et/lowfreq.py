"""The exact low-frequency crop of EfficientTrain: an H x W image becomes a B x B image of its lowest frequencies.

Defined per channel: DFT of the image, keep the centred block of frequencies k = -B/2 .. B/2-1 (even B) or
-(B-1)/2 .. (B-1)/2 (odd B) on both axes, scale by B^2/(HW), inverse DFT, real part. The map is linear and factors by axis
into Y = C X C'^T - S X S'^T with the B x H tables

    C[m, n] = 1/H sum_k cos(2 pi k (m/B - n/H)),    S[m, n] = the same with sin.

The sum over k cancels in S but for the unpaired line k = -B/2 of even B, so S has rank one (zero for odd B) and its term
is a checkerboard times one number an image. Two small matrix products beat the FFT: see benchmarks/.

Shapes: ... any leading dimensions, H x W source px, B bandwidth px.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def low_frequency_crop(images: Tensor, bandwidth: int, centered: bool = False) -> Tensor:
    """Keeps the central bandwidth x bandwidth frequencies of each image.

    The published crop (`centered=False`) samples at n = m H/B, so its result is shifted by (H/B - 1)/2 source px against
    a resized image and a flip before is not a flip after. `centered=True` (ours) samples at the pixel centres,
    n = (m + 1/2) H/B - 1/2, and drops the one corner coefficient without a mirror partner: it commutes with flips.

    Args:
        images: [..., H, W] float16, bfloat16, float32 or float64; computed in float32 or better, also under autocast.
        bandwidth: B in px, 1 <= B <= min(H, W).
        centered: half-pixel phase.
    Returns:
        [..., B, B], dtype of images; the mean over each image is unchanged. Values may leave the input's range (ringing);
        they are not clipped, so that the map stays linear. B = H = W is the identity.
    Raises:
        ValueError: if images are not floating point or not at least 2-D, or B is out of range.
    Source: EfficientTrain (arXiv 2211.09703), low-frequency cropping; the factored real form and `centered` are ours.
    """
    if images.dtype not in FLOAT_DTYPES:
        raise ValueError(f"images are {images.dtype}; convert them to a floating-point type first, e.g. images.float()")
    _check(images, bandwidth)
    dtype = images.dtype if images.dtype == torch.float64 else torch.float32
    return _crop(images.to(dtype), bandwidth, centered).to(images.dtype)


def crop_and_normalize(
    images: Tensor, bandwidth: int, mean: Sequence[float], std: Sequence[float], centered: bool = False
) -> Tensor:
    """Turns a uint8 batch into the normalised low-frequency crop: low_frequency_crop((images / 255 - mean) / std).

    The crop is linear and keeps the mean, so the pixels are normalised after it, where they are fewer.

    Args:
        images: [..., C, H, W] uint8.
        bandwidth: B in px, 1 <= B <= min(H, W).
        mean, std: C values each, of pixels in [0, 1].
        centered: as in `low_frequency_crop`.
    Returns:
        [..., C, B, B] float32.
    Raises:
        ValueError: if images are not uint8, mean or std have not C values, or B is out of range.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}; crop_and_normalize takes uint8")
    _check(images, bandwidth)
    if not len(mean) == len(std) == images.shape[-3]:
        raise ValueError(f"images have {images.shape[-3]} channels, mean {len(mean)} values and std {len(std)}")
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(-1, 1, 1)
    return _crop(images.to(torch.float32), bandwidth, centered).mul_(scale).add_(shift)


def _check(images: Tensor, bandwidth: int) -> None:
    if images.ndim < 2:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected [..., H, W]")
    smallest = min(images.shape[-2:])
    if isinstance(bandwidth, bool) or not isinstance(bandwidth, int) or not 1 <= bandwidth <= smallest:
        raise ValueError(f"bandwidth = {bandwidth!r} must be an integer from 1 to {smallest}, the images' shorter side")


def _crop(images: Tensor, bandwidth: int, centered: bool) -> Tensor:
    height, width, bandwidth = (operator.index(n) for n in (*images.shape[-2:], bandwidth))  # fixed sizes when compiled
    if height == width == bandwidth:
        return images.clone()
    with torch.autocast(images.device.type, enabled=False):
        columns = _tables(width, bandwidth, centered, images.dtype, images.device)
        rows = _tables(height, bandwidth, centered, images.dtype, images.device)
        result = _contract_height(_contract_width(images, columns), rows)
        if columns.unpaired is not None and rows.unpaired is not None:
            corner = (images @ columns.unpaired) @ rows.unpaired  # [...]
            result = result.addcmul(corner[..., None, None], rows.checkerboard, value=-1)
        return result


def _contract_width(images: Tensor, tables: _Tables) -> Tensor:
    """[..., H, W] -> [..., H, B]."""
    if images.device.type != "cpu" or images.dtype != torch.float32:
        return images @ tables.full.mT
    # On CPU, oneDNN's 1x1 convolution over channels-last pixels is this product at 2.5 times the speed of sgemm.
    pixels = images.reshape(-1, 1, *images.shape[-2:]).permute(0, 3, 1, 2)
    narrow = F.conv2d(pixels, tables.full[:, :, None, None]).permute(0, 2, 3, 1)
    return narrow.reshape(*images.shape[:-1], tables.bandwidth)


def _contract_height(images: Tensor, tables: _Tables) -> Tensor:
    """[..., H, W] -> [..., B, W]."""
    if images.device.type != "cpu" or images.dtype != torch.float32:
        return tables.full @ images
    # C[m, n] is unchanged when m and n are both mirrored: sums of mirrored rows give the even part of the result,
    # differences the odd one, at half the multiplications.
    half = tables.even.shape[1]
    flat = images.reshape(-1, *images.shape[-2:])
    upper, lower = flat[:, :half], flat.index_select(1, tables.source_mirror)
    even = F.conv1d(upper + lower, tables.even[:, :, None])
    odd = F.conv1d(upper - lower, tables.odd[:, :, None])
    result = torch.cat([even + odd, (even - odd).index_select(1, tables.target_mirror)], dim=1)
    return result.reshape(*images.shape[:-2], tables.bandwidth, images.shape[-1])


class _Tables(NamedTuple):
    """The tables of one axis: H source pixels to B."""

    bandwidth: int
    full: Tensor  # C [B, H]
    unpaired: Tensor | None  # s [H]: S[m, n] = (-1)^m s[n]; None where S is zero or dropped
    checkerboard: Tensor  # (-1)^(m + n) [B, B]
    even: Tensor  # [b, h], h and b: the first halves, rounded up
    odd: Tensor  # [b, h]
    source_mirror: Tensor  # [h], the row that mirrors each of the first h
    target_mirror: Tensor  # [B - b], the row among the first b that mirrors each of the others


@torch.compiler.assume_constant_result
def _tables(size: int, bandwidth: int, centered: bool, dtype: torch.dtype, device: torch.device) -> _Tables:
    return _cached_tables(size, bandwidth, centered, dtype, device)


@functools.lru_cache(maxsize=64)
def _cached_tables(size: int, bandwidth: int, centered: bool, dtype: torch.dtype, device: torch.device) -> _Tables:
    offset = 0.5 if centered else 0.0
    target = (torch.arange(bandwidth, dtype=torch.float64) + offset) / bandwidth
    source = (torch.arange(size, dtype=torch.float64) + offset) / size
    phase = 2 * math.pi * (target[:, None] - source)
    table = torch.ones_like(phase)
    for k in range(1, (bandwidth + 1) // 2):
        table += 2 * torch.cos(k * phase)
    if bandwidth % 2 == 0:
        table += torch.cos(bandwidth // 2 * phase)
    table /= size
    unpaired = torch.sin(math.pi * bandwidth * source) / size if bandwidth % 2 == 0 and not centered else None

    source_mirror, target_mirror = _mirror(size, centered), _mirror(bandwidth, centered)
    h, b = (n - n // 2 if centered else n // 2 + 1 for n in (size, bandwidth))  # published: pixel 0 mirrors itself
    upper, lower = table[:b, :h], table[:b, source_mirror[:h]]
    weight = torch.where(source_mirror[:h] == torch.arange(h), 0.25, 0.5).to(torch.float64)
    signs = (1 - 2 * (torch.arange(bandwidth) % 2)).to(torch.float64)

    def placed(values: Tensor) -> Tensor:
        return values.to(device=device, dtype=dtype)

    return _Tables(
        bandwidth=bandwidth,
        full=placed(table),
        unpaired=None if unpaired is None else placed(unpaired),
        checkerboard=placed(signs[:, None] * signs),
        even=placed((upper + lower) * weight),
        odd=placed((upper - lower) * weight),
        source_mirror=source_mirror[:h].to(device),
        target_mirror=target_mirror[b:].to(device),
    )


def _mirror(size: int, centered: bool) -> Tensor:
    """Returns the mirrored pixel of each: size - 1 - n about the image's centre, -n (mod size) about pixel 0."""
    pixels = torch.arange(size)
    return size - 1 - pixels if centered else -pixels % size
