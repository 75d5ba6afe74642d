"""The exact low-frequency crop of EfficientTrain: an H x W image becomes a B x B image of its lowest frequencies.

The result may also be a rectangle, with a bandwidth of its own for each axis. Defined per channel: DFT of the image, keep
the centred block of frequencies k = -B/2 .. B/2-1 (even B) or -(B-1)/2 .. (B-1)/2 (odd B) of each axis, scale by the area
of the result over that of the image, inverse DFT, real part. The map is linear and factors by axis into
Y = C X C'^T - S X S'^T with the B x H tables

    C[m, n] = 1/H sum_k cos(2 pi k (m/B - n/H)),    S[m, n] = the same with sin.

The sum over k cancels in S but for the unpaired line k = -B/2 of even B, so S has rank one (zero for odd B) and its term
is a checkerboard times one number an image. Two small matrix products beat the FFT: see benchmarks/.

Shapes: ... any leading dimensions, H x W source px, B bandwidth px, Bh x Bw px of the result (B x B for one bandwidth).
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

CHUNK = 24  # channels at once on a CPU: 5 MB of a 224 px image, measured best of 6 to 64
IMAGE_DTYPES = (torch.uint8, torch.float32)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def low_frequency_crop(images: Tensor, bandwidth: int | tuple[int, int], centered: bool = False) -> Tensor:
    """Keeps the central Bh x Bw frequencies of each image.

    The published crop (`centered=False`) samples at n = m H/B, so its result is shifted by (H/B - 1)/2 source px against
    a resized image and a flip before is not a flip after. `centered=True` (ours) samples at the pixel centres,
    n = (m + 1/2) H/B - 1/2, and drops the one corner coefficient without a mirror partner: it commutes with flips.

    Args:
        images: [..., H, W] float16, bfloat16, float32 or float64; computed in float32 or better, also under autocast.
        bandwidth: B in px, or (Bh, Bw); 1 <= Bh <= H and 1 <= Bw <= W.
        centered: half-pixel phase.
    Returns:
        [..., Bh, Bw], dtype of images; the mean over each image is unchanged. Values may leave the input's range (ringing);
        they are not clipped, so that the map stays linear. Bh = H with Bw = W is the identity.
    Raises:
        ValueError: if images are not floating point or not at least 2-D, or B is out of range.
    Source: EfficientTrain (arXiv 2211.09703), low-frequency cropping; the factored real form and `centered` are ours.
    """
    if images.dtype not in FLOAT_DTYPES:
        raise ValueError(f"images are {images.dtype}; convert them to a floating-point type first, e.g. images.float()")
    _check(images, bandwidth)
    dtype = images.dtype if images.dtype == torch.float64 else torch.float32
    return _crop(images, bandwidth, centered, dtype).to(images.dtype)


def crop_and_normalize(
    images: Tensor,
    bandwidth: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    centered: bool = False,
) -> Tensor:
    """Turns a batch of images into their normalised low-frequency crop: low_frequency_crop((images - mean) / std).

    The crop is linear and keeps the mean, so the pixels are normalised after it, where they are fewer.

    Args:
        images: [..., C, H, W] uint8, which are divided by 255, or float32 in [0, 1].
        bandwidth: B in px, or (Bh, Bw); 1 <= Bh <= H and 1 <= Bw <= W.
        mean, std: C values each, of pixels in [0, 1].
        centered: as in `low_frequency_crop`.
    Returns:
        [..., C, Bh, Bw] float32.
    Raises:
        ValueError: if images have another type, mean or std have not C values, or B is out of range.
    """
    if images.dtype not in IMAGE_DTYPES:
        raise ValueError(f"images are {images.dtype}; crop_and_normalize takes uint8 or float32")
    if images.ndim < 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected [..., C, H, W]")
    _check(images, bandwidth)
    _check_channels(images, mean, std)
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.dtype, images.device)
    return _crop(images, bandwidth, centered, torch.float32).mul_(scale).add_(shift)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor | None = None) -> Tensor:
    """Returns (images - mean) / std, the very numbers of `crop_and_normalize` for images at the bandwidth already.

    A few images at a time, while they are in the cache. Into memory that is there already (`out`) this takes a third of
    the time that it takes into new pages.

    Args:
        images: [n, C, H, W] uint8, which are divided by 255, or float32 in [0, 1].
        mean, std: C values each, of pixels in [0, 1].
        out: [n, C, H, W] float32, overwritten; None: new.
    Returns:
        [n, C, H, W] float32.
    Raises:
        ValueError: if images have another type or are not 4-D, or mean or std have not C values.
    """
    if images.dtype not in IMAGE_DTYPES or images.ndim != 4:
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; normalize takes uint8 or float32 [n, C, H, W]"
        )
    _check_channels(images, mean, std)
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.dtype, images.device)
    result = torch.empty_like(images, dtype=torch.float32) if out is None else out
    size = max(1, CHUNK // images.shape[1])
    for part, target in zip(images.split(size), result.split(size), strict=True):
        target.copy_(part).mul_(scale).add_(shift)
    return result


def crop_to_bytes(images: Tensor, bandwidth: int | tuple[int, int], centered: bool = False) -> Tensor:
    """Crops a uint8 batch to a uint8 one: rounded to whole levels, and ringing beyond black and white clipped.

    Args:
        images: [..., H, W] uint8.
        bandwidth: B in px, or (Bh, Bw); 1 <= Bh <= H and 1 <= Bw <= W.
        centered: as in `low_frequency_crop`.
    Returns:
        [..., Bh, Bw] uint8. Against the crop before rounding: see docs/guides/loading.md for the PSNR on photos.
    Raises:
        ValueError: if images are not uint8, or B is out of range.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}; crop_to_bytes takes uint8")
    _check(images, bandwidth)
    return _crop(images, bandwidth, centered, torch.float32).round_().clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """[C, 1, 1] each; cached, because a copy to a GPU makes the host wait."""
    white = 255 if dtype == torch.uint8 else 1
    scale = torch.tensor([1 / (white * s) for s in std], device="cpu").view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device="cpu").view(-1, 1, 1)
    return scale.to(device), shift.to(device)


def _check(images: Tensor, bandwidth: int | tuple[int, int]) -> None:
    if images.ndim < 2:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected [..., H, W]")
    shape = tuple(images.shape[-2:])
    sides = bandwidth if isinstance(bandwidth, tuple) and len(bandwidth) == 2 else (bandwidth, bandwidth)
    for side, limit in zip(sides, shape, strict=True):
        if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= limit:
            limits = f"an integer from 1 to {min(shape)}, the images' shorter side"
            if isinstance(bandwidth, tuple):
                limits = f"two integers from 1 to the height and width of the images, {shape[0]} and {shape[1]}"
            raise ValueError(f"bandwidth = {bandwidth!r} must be {limits}")


def _check_channels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    if not len(mean) == len(std) == images.shape[-3]:
        raise ValueError(f"images have {images.shape[-3]} channels, mean {len(mean)} values and std {len(std)}")


def _crop(images: Tensor, bandwidth: int | tuple[int, int], centered: bool, dtype: torch.dtype) -> Tensor:
    """Any type in, `dtype` out."""
    sides = bandwidth if isinstance(bandwidth, tuple) else (bandwidth, bandwidth)
    height, width, *wanted = (operator.index(n) for n in (*images.shape[-2:], *sides))  # fixed sizes when compiled
    if (height, width) == (wanted[0], wanted[1]):
        return images.to(dtype, copy=True)
    with torch.autocast(images.device.type, enabled=False):
        rows = _tables(height, wanted[0], centered, dtype, images.device)
        columns = _tables(width, wanted[1], centered, dtype, images.device)
        needs_gradient = torch.is_grad_enabled() and images.requires_grad
        if images.device.type != "cpu" or dtype != torch.float32 or needs_gradient or torch.compiler.is_compiling():
            images = images.to(dtype)
            return _with_corner(rows.full @ (images @ columns.full.mT), images, columns, rows)
        return _crop_on_cpu(images, columns, rows)


def _crop_on_cpu(images: Tensor, columns: _Tables, rows: _Tables) -> Tensor:
    """The same products by oneDNN's 1x1 convolutions, 2.5 times as fast as sgemm, a chunk that fits the cache at a time."""
    flat = images.contiguous().view(-1, *images.shape[-2:])
    result = torch.empty(len(flat), rows.bandwidth, columns.bandwidth)
    for part, out in zip(flat.split(CHUNK), result.split(CHUNK), strict=True):
        part = part.to(torch.float32)
        pixels = part[:, None].permute(0, 3, 1, 2)  # [n, W, 1, H], channels last
        narrow = F.conv2d(pixels, columns.full[:, :, None, None]).permute(0, 2, 3, 1)[:, 0]
        out.copy_(_with_corner(F.conv1d(narrow, rows.full[:, :, None]), part, columns, rows))
    return result.view(*images.shape[:-2], *result.shape[-2:])


def _with_corner(product: Tensor, images: Tensor, columns: _Tables, rows: _Tables) -> Tensor:
    """Subtracts S X S'^T from C X C'^T, where S is not zero."""
    if columns.unpaired is None or rows.unpaired is None:
        return product
    corner = (images @ columns.unpaired) @ rows.unpaired  # [...]
    checkerboard = rows.signs[:, None] * columns.signs  # (-1)^(m + n) [Bh, Bw]
    return product.addcmul(corner[..., None, None], checkerboard, value=-1)


class _Tables(NamedTuple):
    """The tables of one axis: H source pixels to B."""

    bandwidth: int
    full: Tensor  # C [B, H]
    unpaired: Tensor | None  # s [H]: S[m, n] = (-1)^m s[n]; None where S is zero or dropped
    signs: Tensor  # (-1)^m [B]


@torch.compiler.assume_constant_result
def _tables(size: int, bandwidth: int, centered: bool, dtype: torch.dtype, device: torch.device) -> _Tables:
    return _cached_tables(size, bandwidth, centered, dtype, device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # tables made under it could not be used in training
def _cached_tables(size: int, bandwidth: int, centered: bool, dtype: torch.dtype, device: torch.device) -> _Tables:
    offset = 0.5 if centered else 0.0
    pixels = torch.arange(size, dtype=torch.float64, device="cpu")  # not the default device of the first call
    target, source = (pixels[:bandwidth] + offset) / bandwidth, (pixels + offset) / size
    phase = 2 * math.pi * (target[:, None] - source)
    table = torch.ones_like(phase)
    for k in range(1, (bandwidth + 1) // 2):
        table += 2 * torch.cos(k * phase)
    if bandwidth % 2 == 0:
        table += torch.cos(bandwidth // 2 * phase)
    unpaired = torch.sin(math.pi * bandwidth * source) / size if bandwidth % 2 == 0 and not centered else None
    signs = 1 - 2 * (pixels[:bandwidth] % 2)
    return _Tables(
        bandwidth=bandwidth,
        full=(table / size).to(device, dtype),
        unpaired=None if unpaired is None else unpaired.to(device, dtype),
        signs=signs.to(device, dtype),
    )
