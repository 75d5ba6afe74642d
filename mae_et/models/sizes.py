"""Sizes that configs, plans and models share: the table of models, patches kept, values of a target. Standard library only."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass

NUM_HOG_BINS = 9


# The published sizes (base, large, huge) and two smaller ones of ours. The decoders of tiny and small are ours.
@dataclass(frozen=True)
class MAESize:
    """Widths, depths and heads of encoder and decoder. Source: MAE (arXiv 2111.06377) for base, large and huge."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0


MAE_SIZES: Mapping[str, MAESize] = types.MappingProxyType(
    {
        "tiny": MAESize(192, 12, 3, decoder_embed_dim=128, decoder_depth=4, decoder_num_heads=4),
        "small": MAESize(384, 12, 6, decoder_embed_dim=256, decoder_depth=4, decoder_num_heads=8),
        "base": MAESize(768, 12, 12),
        "large": MAESize(1024, 24, 16),
        "huge": MAESize(1280, 32, 16, patch_size=14),
    }
)


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """Returns how many patches of an image stay: int(L (1 - r)), as in the MAE paper's code."""
    return int(num_patches * (1 - mask_ratio))


def hog_cell(patch_size: int, cell_size: int | None = None) -> int:
    """Returns the side of a HOG cell in px; None: half a patch, which is 8 px of 16 as published.

    Raises:
        ValueError: if the patch is no multiple of the cell.
    """
    cell = patch_size // 2 if cell_size is None else cell_size
    if cell < 1 or patch_size % cell:
        divisors = [n for n in range(1, patch_size + 1) if patch_size % n == 0]
        told = "half a patch of odd side is no cell" if cell_size is None else f"it is no multiple of {cell} px"
        raise ValueError(
            f"patches of {patch_size} px do not divide into HOG cells ({told}); hog_cell_size may be "
            f"{', '.join(map(str, divisors))}"
        )
    return cell


def target_width(target: str, patch_size: int, in_chans: int, hog_cell_size: int | None = None) -> int:
    """Returns the number of values that the decoder predicts for a patch, target "pixels" or "hog"."""
    if target == "hog":
        cells = (patch_size // hog_cell(patch_size, hog_cell_size)) ** 2
        return in_chans * NUM_HOG_BINS * cells
    return in_chans * patch_size**2
