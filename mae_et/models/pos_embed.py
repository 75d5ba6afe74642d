"""Fixed 2-D positions for any grid: sine-cosine embeddings, and the rotations of DINOv3.

Shapes: gh x gw patches, D channels, d channels of a head.
"""

from __future__ import annotations

import functools
import math

import torch
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor

TEMPERATURE = 10000.0


def sincos_pos_embed(embed_dim: int, grid_size: tuple[int, int], cls_token: bool = True) -> Tensor:
    """Returns the position embedding of a grid.

    The first half of the channels encodes the column, the second half the row. Each half holds sines, then cosines.

    Args:
        embed_dim: D, a multiple of 4.
        grid_size: (gh, gw) in patches.
        cls_token: add a zero row at the start.
    Returns:
        [1, gh * gw (+ 1), D] float32.
    Raises:
        ValueError: if embed_dim is not a multiple of 4.
    Source: MAE (arXiv 2111.06377); the channel order is the same as in its released weights.
    """
    return _cached_table(embed_dim, *grid_size, cls_token).clone()


def sincos_pos_embed_on(embed_dim: int, grid_size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns `sincos_pos_embed` with the zero row on a device. The result is cached: do not modify it."""
    return _placed(embed_dim, *grid_size, device, dtype)


def rotations_on(head_dim: int, grid_size: tuple[int, int], device: torch.device) -> Tensor:
    """Returns the sines and cosines by which DINOv3 rotates queries and keys. The result is cached: do not modify it.

    The centre of each patch has coordinates between -1 and 1 along height and width, for a grid of any size.

    Args:
        head_dim: d, a multiple of 4.
        grid_size: (gh, gw) in patches.
        device: of the result.
    Returns:
        [gh gw, 2 d] float32, sines before cosines, for `timm.layers.apply_rot_embed_cat` with half = True.
    Source: DINOv3 (arXiv 2508.10104), with base 100, by timm's RotaryEmbeddingDinoV3.
    """
    return _placed_rotations(head_dim, *grid_size, device)


def is_sincos_table(table: Tensor) -> bool:
    """Returns whether a table is the fixed one of some grid; see `sincos_grid`."""
    return sincos_grid(table) is not None


def sincos_grid(table: Tensor) -> tuple[int, int] | None:
    """Returns the grid of a fixed table with a zero row at the start; None for any other table.

    Args:
        table: [1, 1 + gh gw, D].
    Returns:
        (gh, gw) of the table that equals this one up to rounding of its dtype.
    """
    if table.ndim != 3 or table.shape[1] < 2 or not table.shape[2] or table.shape[2] % 4:
        return None
    if not table.is_floating_point():
        return None
    table = table.detach().cpu()  # the fixed tables are made on the CPU
    num_patches, dim = table.shape[1] - 1, table.shape[2]
    # The last patch holds the sines of the last column and the last row, so most grids need not be compared.
    last_column, last_row = table[0, -1, 0].item(), table[0, -1, dim // 2].item()
    for rows in range(1, num_patches + 1):
        columns = num_patches // rows
        if rows * columns != num_patches:
            continue
        if max(abs(last_column - math.sin(columns - 1)), abs(last_row - math.sin(rows - 1))) > 0.01:
            continue
        fixed = sincos_pos_embed(dim, (rows, columns))
        # The tolerance is small because a table that was fine-tuned stays close to the fixed one but is a different table.
        if torch.allclose(table.float(), fixed, rtol=torch.finfo(table.dtype).eps, atol=1e-4):
            return rows, columns
    return None


@torch.compiler.assume_constant_result
def _placed(embed_dim: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _cached_placed(embed_dim, rows, columns, device, dtype)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # tables created in inference mode cannot be used in training
def _cached_placed(embed_dim: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _cached_table(embed_dim, rows, columns, True).to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # tables created in inference mode cannot be used in training
def _cached_table(embed_dim: int, rows: int, columns: int, cls_token: bool) -> Tensor:
    if embed_dim % 4:
        raise ValueError(
            f"embed_dim = {embed_dim} must be a multiple of 4, because each of two axes has sines and cosines"
        )
    frequencies = TEMPERATURE ** -(torch.arange(embed_dim // 4, dtype=torch.float64, device="cpu") / (embed_dim / 4))

    def encode(positions: int) -> Tensor:  # [positions, D / 2]
        angles = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    by_column = encode(columns).expand(rows, columns, embed_dim // 2)
    by_row = encode(rows)[:, None].expand(rows, columns, embed_dim // 2)
    table = torch.cat([by_column, by_row], dim=2).reshape(1, rows * columns, embed_dim)
    if cls_token:
        table = torch.cat([torch.zeros(1, 1, embed_dim, dtype=torch.float64, device="cpu"), table], dim=1)
    return table.float()


@torch.compiler.assume_constant_result
def _placed_rotations(head_dim: int, rows: int, columns: int, device: torch.device) -> Tensor:
    return _cached_rotations(head_dim, rows, columns, device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # as above
def _cached_rotations(head_dim: int, rows: int, columns: int, device: torch.device) -> Tensor:
    rope = RotaryEmbeddingDinoV3(head_dim, temperature=100.0, rotate_half=True)
    return rope.get_embed([rows, columns]).to(device)
