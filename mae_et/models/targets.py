"""Pixel targets of the decoder: patches, raw or normalised by their own mean and variance.

Shapes: N images, C channels, gh x gw = L patches of p x p px.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORM_EPS = 1e-6


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts images into patches.

    Args:
        images: [N, C, gh p, gw p].
        patch_size: p in px.
    Returns:
        [N, L, p p C], row by row; the order within a patch is (row, column, channel).
    Raises:
        ValueError: if a side is not a multiple of p.
    Source: the order of the released MAE decoders.
    """
    n, c, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"images are {height} x {width} px, not a multiple of patch_size = {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(n, c, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(n, rows * columns, patch_size * patch_size * c)


def unpatchify(patches: Tensor, patch_size: int, grid_size: tuple[int, int]) -> Tensor:
    """Inverts `patchify`.

    Args:
        patches: [N, L, p p C].
        patch_size: p in px.
        grid_size: (gh, gw).
    Returns:
        [N, C, gh p, gw p].
    """
    n, _, pixels = patches.shape
    (rows, columns), c = grid_size, pixels // patch_size**2
    placed = patches.reshape(n, rows, columns, patch_size, patch_size, c)
    return placed.permute(0, 5, 1, 3, 2, 4).reshape(n, c, rows * patch_size, columns * patch_size)


def patch_stats(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and the standard deviation (unbiased, eps inside the root) of each patch, [..., 1] each."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + NORM_EPS).sqrt()


def normalize_patches(patches: Tensor) -> Tensor:
    """Normalises each patch by its own mean and variance. [..., P] -> [..., P]."""
    mean, std = patch_stats(patches)
    return (patches - mean) / std


def denormalize_patches(normalized: Tensor, originals: Tensor) -> Tensor:
    """Inverts `normalize_patches` with the statistics of the original patches. [..., P] -> [..., P]."""
    mean, std = patch_stats(originals)
    return normalized * std + mean
