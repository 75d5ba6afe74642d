"""The protocol of an image source: what the loader, the probes and the tools ask of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import numpy as np
from PIL import Image

from mae_et.data.arrays import ImageArray
from mae_et.data.decoding import Decoding
from mae_et.data.sources.listing import LeftOut
from mae_et.models.sizes import Size


class ImageSource(Protocol):
    """Images by index. `labels` has one class index for each image, or is None. `class_names` may always be None."""

    @property
    def labels(self) -> Sequence[int] | np.ndarray | None: ...

    @property
    def class_names(self) -> Sequence[str] | None: ...

    @property
    def decoding(self) -> Decoding:
        """Number of channels, value range, size limit and type of all images."""
        ...

    @property
    def left_out(self) -> LeftOut:
        """What lies among the images and is not read."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Returns the image's path, or `shard.tar:member`, for messages: unprintable characters are escaped."""
        ...

    def key(self, index: int) -> str:
        """Returns the exact name within the source: the path below its root, or `shard.tar:member`."""
        ...

    def size(self, index: int) -> int | None:
        """Returns the size of the image's file in bytes; None where there is no file, or none that can be read."""
        ...

    def read(self, index: int) -> bytes | None:
        """Returns the content of the image's file, or None where there is no file. Errors as `load`."""
        ...

    def load(self, index: int) -> Image.Image | ImageArray:
        """Returns the decoded image: mode RGB or L if `decoding.is_picture`, otherwise an array.

        Raises:
            BadImageError: if it cannot be read.
        """
        ...


def load_picture(source: ImageSource, index: int) -> Image.Image:
    """Returns an image of a source whose `decoding.is_picture`."""
    image = source.load(index)
    assert isinstance(image, Image.Image), "the source was opened for pictures"
    return image


class RegionSource(ImageSource, Protocol):
    """A source of stored pixels, of which a part can be read. `raw.RawSource` is one."""

    def shape(self, index: int) -> tuple[int, int]:
        """Returns the height and width of an image, px."""
        ...

    def read_region(self, index: int, box: tuple[int, int, int, int], size: int | Size | None = None) -> np.ndarray:
        """Returns the part (top, left, height, width) of an image, [h, w, C] of the type of `decoding`.

        It has `size` px or more for each side where the source has them. Errors as `load`.
        """
        ...

    def check_sizes(self, sizes: Iterable[int | Size]) -> None:
        """Raises UserError if the source was reduced below one of the sizes that crops are resized to, px."""
        ...


def as_regions(source: ImageSource) -> RegionSource | None:
    """Returns the source if parts of its images can be read, otherwise None."""
    # Not isinstance with a runtime protocol, which would compute the labels to see whether there are any.
    return cast(RegionSource, source) if hasattr(source, "read_region") else None


def read_ahead(source: ImageSource, indices: Sequence[int], only_always: bool = False) -> None:
    """Lets a source fetch images that will be read next, if it has the optional method `read_ahead(indices)`.

    Args:
        source: the images.
        indices: of the images.
        only_always: skip sources that read images one by one well enough, which are those without `reads_ahead_always`.
    """
    if hasattr(source, "read_ahead") and (not only_always or getattr(source, "reads_ahead_always", False)):
        source.read_ahead(indices)


def parts_of(source: ImageSource) -> Sequence[ImageSource]:
    """Returns the sources that a `ConcatSource` joins; any other source is its own only part."""
    return getattr(source, "parts", (source,))
