"""Fixed 2-D sine-cosine position embeddings for any grid.

Shapes: gh x gw patches, D channels.
"""

from __future__ import annotations

import functools

import torch
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


def is_sincos_table(table: Tensor) -> bool:
    """Returns whether [1, 1 + s s, D] is the fixed table of an s x s grid with a zero row, up to rounding of its dtype."""
    side = round((table.shape[1] - 1) ** 0.5) if table.ndim == 3 and table.shape[1] > 1 else 0
    if not side or side * side != table.shape[1] - 1 or table.shape[2] % 4 or not table.is_floating_point():
        return False
    fixed = sincos_pos_embed(table.shape[2], (side, side))
    # The tolerance is small because a table that was fine-tuned stays close to the fixed one but is a different table.
    return torch.allclose(table.float(), fixed, rtol=torch.finfo(table.dtype).eps, atol=1e-4)


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
