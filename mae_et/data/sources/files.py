"""The base of the sources whose images are files of their own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from PIL import Image

from mae_et.data.decoding import Decoding, decode_image, file_size, read_file
from mae_et.errors import printable


class FileSource:
    """Reads images by `path(index)`, which each source of files defines."""

    decoding: Decoding

    def path(self, index: int) -> str:
        """Returns the exact path of an image's file."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def size(self, index: int) -> int | None:
        return file_size(self.path(index))

    def read(self, index: int) -> bytes:
        return read_file(self.path(index))

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Asks the system to read images from the disk."""
        if not hasattr(os, "posix_fadvise"):
            return
        for index in sorted(indices):  # the order of the names, which is often that of the disk
            with contextlib.suppress(OSError):  # `read` reports it
                descriptor = os.open(self.path(index), os.O_RDONLY | os.O_NONBLOCK)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)

    def load(self, index: int) -> Image.Image:
        return decode_image(self.read(index), *self.decoding)
