"""Histograms of oriented gradients (HOG) as target: the strength of edges in each direction, per cell and channel.

Shapes: N images, C channels, H x W px, p patch size, L = (H/p)(W/p) patches, q cell size, k = p/q cells per patch side.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.models.sizes import NUM_HOG_BINS, hog_cell

NUM_SLOTS = 2 * NUM_HOG_BINS + 1
# Smallest norm by which the histogram of a cell is divided. Rounding errors in flat regions stay near 0 instead of
# becoming a direction. One grey level of 256 in a few pixels of an image of unit deviation exceeds this norm.
NORM_FLOOR = 1e-5


@torch.no_grad()
def hog_patches(images: Tensor, patch_size: int, cell_size: int | None = None) -> Tensor:
    """Computes the descriptors of all patches.

    Sobel gradients are computed per channel. Each pixel votes for one of 9 directions over 180 degrees, with the magnitude
    of its gradient, weighted by a Gaussian around the centre of its patch. The votes of a cell are summed and divided by
    their L2 norm.

    Args:
        images: [N, C, H, W], normalised; H and W are multiples of p and at least 2.
        patch_size: p in px; also the side of the Gaussian window of sigma p / 2 (16 and 8 px, as published).
        cell_size: q in px; None: half a patch.
    Returns:
        [N, L, C 9 k k] float32 (float64 for float64 images), row by row; the order within a patch is (channel, direction,
        cell row, cell column). Direction b holds gradients with atan2(horizontal, vertical) from 20 b to 20 (b + 1)
        degrees, modulo 180. No gradient flows through the result.
    Raises:
        ValueError: if a side is not a multiple of p, or p is not a multiple of q.
    Source: MaskFeat (arXiv 2112.09133); window and cells scale with the patch.
    """
    n, c, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"images are {height} x {width} px, not a multiple of patch_size = {patch_size}")
    cell = hog_cell(patch_size, cell_size)
    rows, columns = height // cell, width // cell
    # float32 also under autocast: with 8 bits of mantissa, votes would fall into other directions.
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    across, down = _sobel(images)
    window = _window(patch_size, height, width, images.dtype, images.device)
    votes = (across * across).addcmul_(down, down).sqrt_().mul_(window)

    # atan2 / pi * 9 lies in [-9, 9]. A cell has one slot for each integer in it; these are folded to 9 below.
    plane = rows * columns * NUM_SLOTS
    kind = torch.int32 if n * c * plane < 2**31 else torch.int64
    slots = torch.atan2(across, down).div_(math.pi).mul_(NUM_HOG_BINS).floor_().to(kind).flatten(0, 1)
    slots += _first_slots(height, width, cell, kind, images.device)
    slots += (torch.arange(n * c, dtype=kind, device=images.device) * plane).view(-1, 1, 1)
    histogram = votes.new_zeros(n * c * plane).index_add_(0, slots.flatten(), votes.flatten()).view(-1, NUM_SLOTS)
    folded = histogram[:, :NUM_HOG_BINS] + histogram[:, NUM_HOG_BINS : 2 * NUM_HOG_BINS]
    folded[:, 0] += histogram[:, -1]
    cells = F.normalize(folded, dim=1, eps=NORM_FLOOR)

    k = patch_size // cell
    cut = cells.view(n, c, rows // k, k, columns // k, k, NUM_HOG_BINS).permute(0, 2, 4, 1, 6, 3, 5)
    return cut.reshape(n, rows // k * (columns // k), c * NUM_HOG_BINS * k * k)


def hog_cells(patches: Tensor, in_chans: int, grid_size: tuple[int, int]) -> Tensor:
    """Arranges descriptors as an image of cells.

    Args:
        patches: [N, L, C 9 k k], as from `hog_patches`.
        in_chans: C.
        grid_size: (H/p, W/p).
    Returns:
        [N, C, 9, H/q, W/q].
    """
    n, _, width = patches.shape
    (rows, columns), k = grid_size, math.isqrt(width // (in_chans * NUM_HOG_BINS))
    placed = patches.reshape(n, rows, columns, in_chans, NUM_HOG_BINS, k, k).permute(0, 3, 4, 1, 5, 2, 6)
    return placed.reshape(n, in_chans, NUM_HOG_BINS, rows * k, columns * k)


def _sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the horizontal and vertical gradients with mirrored borders, [N, C, H, W] each.

    Uses sums of slices, because autocast would run a convolution in half precision.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    smooth_down = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    smooth_across = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    return smooth_down[..., :-2] - smooth_down[..., 2:], smooth_across[..., :-2, :] - smooth_across[..., 2:, :]


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _window(side: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns [height, width]: a Gaussian of sum 1 over each side x side px."""
    offsets = torch.arange(side, dtype=torch.float64, device="cpu") - (side - 1) / 2
    bell = torch.exp(-(offsets**2) / (2 * (side / 2) ** 2))
    tile = torch.outer(bell, bell)
    return (tile / tile.sum()).repeat(height // side, width // side).to(device, dtype)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _first_slots(height: int, width: int, cell: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns [height, width]: the index of the middle slot of the cell of each pixel, within one plane."""
    rows, columns = (torch.arange(side, dtype=dtype, device="cpu") // cell for side in (height, width))
    return ((rows[:, None] * (width // cell) + columns) * NUM_SLOTS + NUM_HOG_BINS).to(device)
