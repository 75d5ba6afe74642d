"""Sizes that configs, plans and models share: image sizes, model sizes, number of visible patches, width of a target.

Uses the standard library only, so that plans need no torch.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NUM_HOG_BINS = 9

Size = tuple[int, int]  # of an image: (height, width), px


def as_size(size: int | Sequence[int]) -> Size:
    """Returns (height, width) of the side of a square, or of two sides.

    Raises:
        ValueError: if there are not two sides.
    """
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def plain_size(size: Size) -> int | list[int]:
    """Returns a size as configs and records store it: an int for a square, else [height, width]."""
    return size[0] if size[0] == size[1] else list(size)


def size_text(size: int | Size) -> str:
    """Returns a size for messages: "224", or "360 x 480" (height x width)."""
    height, width = as_size(size)
    return str(height) if height == width else f"{height} x {width}"


def recorded_size(metadata: Mapping[str, str], default: int | Size = 224) -> Size:
    """Returns the image size that the metadata of a weight file records as JSON; `default` if there is none."""
    return as_size(json.loads(metadata["image_size"]) if "image_size" in metadata else default)


def snap(length: float, limit: int, multiple: int) -> int:
    """Returns the nearest multiple of `multiple`, at least one and at most `limit`; all in px. A tie goes up."""
    return min(limit, max(1, math.floor(length / multiple + 0.5)) * multiple)


def size_at(bandwidth: int, image_size: Size, multiple: int) -> Size:
    """Returns the size of images at a bandwidth.

    The bandwidth is that of the shorter side. The longer side keeps the aspect, rounded to the nearest multiple.

    Args:
        bandwidth: B in px, at most the shorter side.
        image_size: of the run; both sides are multiples of `multiple`.
        multiple: px, e.g. the patch size.
    """
    shorter = min(image_size)
    height, width = (
        bandwidth if side == shorter else snap(side * bandwidth / shorter, side, multiple) for side in image_size
    )
    return height, width


def area_ratio(size: Size, other: Size) -> float:
    """Returns the area of a size over that of another."""
    by_height, by_width = size[0] / other[0], size[1] / other[1]
    return by_height**2 if by_height == by_width else by_height * by_width


def nearest_size(size: Size, multiple: int) -> Size:
    """Returns the nearest size whose sides are multiples of a number, at least one each."""
    height, width = (max(multiple, round(side / multiple) * multiple) for side in size)
    return height, width


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
    decoder_mlp_ratio: float = 4.0
    mlp: str = "gelu"  # of the encoder; "swiglu" for DINOv2 giant and the largest DINOv3


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


def ratio_of(hidden: int, width: int) -> float:
    """Returns a ratio from which timm, which rounds down, computes the hidden width of an MLP: hidden / width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def swiglu_hidden(width: int) -> int:
    """Returns the hidden width of a SwiGLU with about as many weights as a plain MLP of 4 times the width.

    Source: DINOv2 (arXiv 2304.07193): two thirds, rounded up to a multiple of 8.
    """
    return (width * 8 // 3 + 7) // 8 * 8


def count_patches(size: int | Size, patch_size: int) -> int:
    """Returns the number of patches of an image: L."""
    height, width = as_size(size)
    return (height // patch_size) * (width // patch_size)


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """Returns the number of visible patches of an image: int(L (1 - r)), as in the released code of MAE."""
    return int(num_patches * (1 - mask_ratio))


def grid_stride(mask_ratio: float) -> int:
    """Returns the stride s of a grid mask, which keeps one of s x s patches.

    Raises:
        ValueError: if the mask ratio is not 1 - 1 / s^2 for an s of 2 or more.
    """
    stride = max(2, round((1 - mask_ratio) ** -0.5))
    if abs(1 - stride**-2 - mask_ratio) > 0.005:
        near = ", ".join(f"{1 - s**-2:.4g}" for s in (2, 3, 4))
        raise ValueError(
            f"a grid keeps one of s x s patches, so mask_ratio = {mask_ratio:g} must be one of {near}, ..."
        )
    return stride


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
