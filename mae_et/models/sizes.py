"""Sizes that configs, plans and models share: model sizes, number of visible patches, width of a target.

Uses the standard library only, so that plans need no torch.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass

NUM_HOG_BINS = 9


# Base, large and huge are published. Tiny and small, with their decoders, are defined here. Giant (ViT-g/14, 1.1 B) has the
# widths of DINOv2 (arXiv 2304.07193) with plain MLPs; 2b is ViT-2B of arXiv 2303.13496; their decoders are MAE's.
@dataclass(frozen=True)
class MAESize:
    """Defines widths, depths and heads of encoder and decoder. Source: MAE (arXiv 2111.06377) for base, large and huge."""

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
        "giant": MAESize(1536, 40, 24, patch_size=14),
        "2b": MAESize(2560, 24, 32, patch_size=14),
    }
)


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """Returns the number of visible patches of an image: int(L (1 - r)), as in the released code of MAE."""
    return int(num_patches * (1 - mask_ratio))


def hog_cell(patch_size: int, cell_size: int | None = None) -> int:
    """Returns the side of a HOG cell in px. None means half a patch: 8 px for patches of 16 px, as published.

    Raises:
        ValueError: if the patch size is not a multiple of the cell size.
    """
    cell = patch_size // 2 if cell_size is None else cell_size
    if cell < 1 or patch_size % cell:
        divisors = [n for n in range(1, patch_size + 1) if patch_size % n == 0]
        reason = (
            "the default of half a patch needs an even size" if cell_size is None else f"not a multiple of {cell} px"
        )
        raise ValueError(
            f"patches of {patch_size} px do not divide into HOG cells ({reason}): set hog_cell_size to one of "
            f"{', '.join(map(str, divisors))}"
        )
    return cell


def target_width(target: str, patch_size: int, in_chans: int, hog_cell_size: int | None = None) -> int:
    """Returns the number of values that the decoder predicts for a patch, for target "pixels" or "hog"."""
    if target == "hog":
        cells = (patch_size // hog_cell(patch_size, hog_cell_size)) ** 2
        return in_chans * NUM_HOG_BINS * cells
    return in_chans * patch_size**2
