"""Random masks that follow from the place of an image alone."""

from __future__ import annotations

import torch
from torch import Tensor


def place_noise(places: Tensor, num_patches: int, seed: int) -> Tensor:
    """Returns uniform numbers that depend on (seed, place, patch) alone, the same on every device.

    Args:
        places: [n] int64.
        num_patches: L.
        seed: any int.
    Returns:
        [n, L] float32 in [0, 1).
    Source: the finalizer of SplitMix64, a bijection of 64 bits, applied twice.
    """
    patches = torch.arange(num_patches, device=places.device)
    keys = _mix64(_mix64(places + seed * 0x5851F42D4C957F2D % 2**63)[:, None] + patches)
    return (keys >> 40 & 0xFFFFFF).float() / 2**24


def _mix64(x: Tensor) -> Tensor:
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, None)):
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))  # a logical shift
        x = x if factor is None else x * factor  # wraps around
    return x
