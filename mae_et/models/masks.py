"""Which patches of an image stay visible: random masks of patches or of squares of patches, block and grid masks.

A mask is an order of the patches: the K patches with the smallest numbers are visible. So each kind has exactly as many
visible patches as random masks, and costs no more.

Shapes: n images, gh x gw patches, L = gh gw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mae_et.models.sizes import grid_stride

NUM_BLOCKS = 32  # candidates; what they leave uncovered is removed at random
BLOCK_AREA = (0.08, 0.25)  # of the image
BLOCK_ASPECT = (0.3, 1 / 0.3)


class Masks(NamedTuple):
    """What is removed together.

    Attributes:
        kind: "random": any patches; "block": the removed patches form rectangles; "grid": the visible patches form a regular
            grid, one of each s x s patches for a mask ratio of 1 - 1 / s^2, shifted at random from image to image.
        square: used with "random": the patches of a square of square x square patches are removed or kept together. Where the
            squares do not tile the grid, they are shifted at random from image to image. At most one square is divided, so
            that K is exact.
    """

    kind: str = "random"
    square: int = 1


RANDOM_MASKS = Masks()


def recorded_masks(metadata: Mapping[str, str]) -> Masks:
    """Returns the masks that a file records."""
    return Masks(metadata.get("mask_kind", "random"), int(metadata.get("mask_grid", 1)))


def num_uniform(masks: Masks, grid_size: tuple[int, int]) -> int:
    """Returns how many uniform numbers `mask_order` needs for each image."""
    more = {"random": 0, "block": 4 * NUM_BLOCKS, "grid": 2}[masks.kind]
    if masks.square > 1:
        more += 2 + math.prod(_most_squares(grid_size, masks.square))
    return grid_size[0] * grid_size[1] + more


def mask_order(masks: Masks, uniform: Tensor, grid_size: tuple[int, int], mask_ratio: float) -> Tensor:
    """Returns numbers whose smallest ones mark the visible patches.

    Args:
        masks: what is removed together.
        uniform: [n, num_uniform(masks, grid_size)] in [0, 1).
        grid_size: (gh, gw).
        mask_ratio: fraction of the patches removed; used with "grid".
    Returns:
        [n, L]. Random masks get their uniform numbers unchanged.
    Source: rectangles as in BEiT (arXiv 2106.08254), but placed by their centres, so that corners are covered too; grids as
        in the ablation of MAE (arXiv 2111.06377); squares as in Pixio (arXiv 2512.15715).
    """
    num_patches = grid_size[0] * grid_size[1]
    noise, rest = uniform[:, :num_patches], uniform[:, num_patches:]
    if masks.kind == "block":
        return _block_order(noise, rest.unflatten(1, (4, NUM_BLOCKS)), grid_size)
    if masks.kind == "grid":
        return _grid_order(noise, rest, grid_size, grid_stride(mask_ratio))
    return noise if masks.square == 1 else _square_order(noise, rest, grid_size, masks.square)


def _block_order(noise: Tensor, draws: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Orders patches by the first rectangle that covers them, the last ones first. draws: [n, 4, NUM_BLOCKS]."""
    rows, columns = grid_size
    area = (BLOCK_AREA[0] + (BLOCK_AREA[1] - BLOCK_AREA[0]) * draws[:, 0]) * (rows * columns)
    low, high = map(math.log, BLOCK_ASPECT)
    stretch = (0.5 * (low + (high - low) * draws[:, 1])).exp()  # root of the aspect
    covered = None
    for length, extent, centre in (
        (rows, area.sqrt() * stretch, draws[:, 2]),
        (columns, area.sqrt() / stretch, draws[:, 3]),
    ):
        extent = extent.round().clamp(1, length)
        first = (centre * length - extent / 2).round()
        places = torch.arange(length, device=noise.device)
        inside = (places >= first[..., None]) & (places < (first + extent)[..., None])  # [n, NUM_BLOCKS, length]
        covered = inside[..., :, None] if covered is None else covered & inside[..., None, :]
    assert covered is not None
    numbers = torch.arange(NUM_BLOCKS, device=noise.device).view(1, -1, 1)
    first_cover = torch.where(covered.flatten(2), numbers, NUM_BLOCKS).amin(dim=1)  # [n, L]
    # The last rectangle is cut along its rows, so that the number of removed patches is exact and they stay together.
    along = torch.arange(noise.shape[1], 0, -1, device=noise.device) / (noise.shape[1] + 1)
    within = torch.where(first_cover == NUM_BLOCKS, noise, along)
    return within - first_cover


def _grid_order(noise: Tensor, shifts: Tensor, grid_size: tuple[int, int], stride: int) -> Tensor:
    """Orders the patches of a shifted grid before all others. shifts: [n, 2]."""
    offsets = (shifts * stride).floor()[..., None]
    on_row, on_column = (
        torch.arange(length, device=noise.device) % stride == offsets[:, axis] for axis, length in enumerate(grid_size)
    )
    return noise - (on_row[:, :, None] & on_column[:, None, :]).flatten(1).to(noise.dtype)


def _square_order(noise: Tensor, draws: Tensor, grid_size: tuple[int, int], square: int) -> Tensor:
    """Orders squares of patches at random, and the patches of a square by the noise. draws: [n, 2 + most squares]."""
    shifts, ranks = (draws[:, :2] * square).floor().long(), draws[:, 2:].argsort(dim=1).argsort(dim=1)
    rows, columns = (
        (torch.arange(length, device=noise.device) + (shifts[:, axis, None] if length % square else 0)) // square
        for axis, length in enumerate(grid_size)
    )  # numbers of the squares along an axis, [n, length] or [length]
    number = rows[..., :, None] * _most_squares(grid_size, square)[1] + columns[..., None, :]
    place = ranks.gather(1, number.flatten(-2).expand(len(noise), -1))
    return place + 0.99 * noise  # the noise stays below 1, even when the sum is rounded


def _most_squares(grid_size: tuple[int, int], square: int) -> tuple[int, int]:
    """Returns how many squares can meet each axis: one more where a shift divides them."""
    rows, columns = (length // square + 2 * (length % square > 0) for length in grid_size)
    return rows, columns
