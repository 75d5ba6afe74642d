"""Some images of a source, as a source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
from PIL import Image

from mae_et.data.decoding import Decoding
from mae_et.data.sources.listing import LeftOut
from mae_et.data.sources.source import ImageSource, RegionSource, as_regions, read_ahead
from mae_et.models.sizes import Size


def subset_of(source: ImageSource, indices: np.ndarray) -> ImageSource:
    """Returns the images with these indices, in this order; parts of them can be read where that is so in the source."""
    return SubsetSource(source, indices) if as_regions(source) is None else RegionSubsetSource(source, indices)


class SubsetSource:
    """Images of another source.

    Args:
        source: the images.
        indices: [n] int64.
    """

    def __init__(self, source: ImageSource, indices: np.ndarray) -> None:
        self._source, self._indices = source, indices
        self.labels = None if source.labels is None else np.asarray(source.labels)[indices]
        self.reads_ahead_always = getattr(source, "reads_ahead_always", False)

    @property
    def class_names(self) -> Sequence[str] | None:
        return self._source.class_names

    @property
    def decoding(self) -> Decoding:
        return self._source.decoding

    @property
    def left_out(self) -> LeftOut:
        return self._source.left_out

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(self._place(index))

    def key(self, index: int) -> str:
        return self._source.key(self._place(index))

    def size(self, index: int) -> int | None:
        return self._source.size(self._place(index))

    def read(self, index: int) -> bytes | None:
        return self._source.read(self._place(index))

    def load(self, index: int) -> Image.Image:
        return self._source.load(self._place(index))

    def read_ahead(self, indices: Sequence[int]) -> None:
        read_ahead(self._source, [self._place(index) for index in indices])

    def _place(self, index: int) -> int:
        return int(self._indices[index])


class RegionSubsetSource(SubsetSource):
    """Images of a source of stored pixels."""

    def shape(self, index: int) -> tuple[int, int]:
        return self._regions.shape(self._place(index))

    def read_region(self, index: int, box: tuple[int, int, int, int], size: int | Size | None = None) -> np.ndarray:
        return self._regions.read_region(self._place(index), box, size)

    def check_sizes(self, sizes: Iterable[int | Size]) -> None:
        self._regions.check_sizes(sizes)

    @property
    def _regions(self) -> RegionSource:
        return cast(RegionSource, self._source)
