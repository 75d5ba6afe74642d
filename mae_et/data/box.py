"""Boxes of an image that is stored at several sizes."""

from __future__ import annotations

import math


def scaled_box(
    box: tuple[int, int, int, int], shape: tuple[int, int], level_shape: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Returns a box in px of another level; each edge is rounded to the nearest px, and at least one px is kept."""
    edges = []
    for start, length, full, side in zip(box[:2], box[2:], shape, level_shape, strict=True):
        first = min(math.floor(start * side / full + 0.5), side - 1)
        last = max(math.floor((start + length) * side / full + 0.5), first + 1)
        edges.append((first, last - first))
    (top, rows), (left, columns) = edges
    return top, left, rows, columns
