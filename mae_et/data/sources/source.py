"""The protocol of an image source: what the loader, the probes and the tools ask of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image


class ImageSource(Protocol):
    """Images by index. `labels` has one class index for each image, or is None; `class_names` may always be None."""

    @property
    def labels(self) -> Sequence[int] | None: ...

    @property
    def class_names(self) -> Sequence[str] | None: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call this image: its path, or `shard.tar:member`."""
        ...

    def read(self, index: int) -> bytes | None:
        """The content of the image's file, for `decode_image`, or None where there is no file. Errors as `load`."""
        ...

    def load(self, index: int) -> Image.Image:
        """The decoded image (mode RGB or L); raises BadImageError if it cannot be read."""
        ...
