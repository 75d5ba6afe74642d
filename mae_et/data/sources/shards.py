"""Images in tar shards of the WebDataset layout, read in any order.

As in `folder.py`, what grows with the number of images is kept in flat buffers.
"""

from __future__ import annotations

import logging
import os
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_et.data.decoding import BadImageError, Decoding, decode_image
from mae_et.data.sources.listing import NO_LABEL, LeftOut, PackedNames, read_class_names
from mae_et.data.sources.shard_cache import index_shards
from mae_et.data.sources.shard_names import expand_shards
from mae_et.errors import DataError, printable

log = logging.getLogger(__name__)

MAX_SHARDS = 100_000
MAX_UNPACK_RATIO = 30.0
_MAX_OPEN_SHARDS = 64


class ShardSource:
    """Images in tar shards of the WebDataset layout, read in any order.

    A sample is what shares a member path up to the first dot of its base name: an image (by extension), and perhaps a
    class index as text in `.cls`, or in `.json` under "label" or "cls". Labels exist if every sample has one. A
    `classes.txt` beside the shards (line n, from 0, is class n) gives the class names. What is not read is counted, and
    `tar_index.index_tar` says how dots in names and links are treated.

    The headers of each shard are read once, and the index is kept in the cache folder ($MAE_ET_CACHE, otherwise
    ~/.cache/mae_et/shards). Gzip has no random access, so a compressed shard is decompressed there once. Between runs
    the folder may be removed.

    Args:
        pattern: one shard, or a brace or glob pattern.
        decoding: how the images are decoded.
        max_shards: limit for the number of shards.
        max_unpack_ratio: limit for the size of a gzip shard's content over its own; the first 64 MiB are always taken.
    Raises:
        DataError: if shards are missing, damaged, above a limit or without images, or labels cannot be used.
    """

    labels: Sequence[int] | None
    class_names: Sequence[str] | None
    why_no_labels = ""
    how_to_label = "add a .cls member with the class index to each sample"

    def __init__(
        self,
        pattern: str,
        decoding: Decoding = Decoding(),  # noqa: B008
        max_shards: int = MAX_SHARDS,
        max_unpack_ratio: float = MAX_UNPACK_RATIO,
    ) -> None:
        self.decoding = decoding
        self._shards, indexes = index_shards(expand_shards(pattern, max_shards), max_unpack_ratio)
        self._paths = [str(shard.path) for shard in self._shards]
        self._starts = array("q", accumulate((len(index.sizes) for index in indexes), initial=0))
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._sizes = np.concatenate([index.sizes for index in indexes])
        lengths = np.concatenate([np.diff(index.name_ends, prepend=0) for index in indexes])
        self._names = PackedNames(b"".join(index.names.tobytes() for index in indexes), np.cumsum(lengths))
        self._handles: dict[int, _Handle] = {}
        self.left_out = LeftOut()
        for index in indexes:
            self.left_out.update(index.left_out)
        shown = printable(pattern)
        if not len(self):
            inside = self.left_out.describe() or "there are none"
            raise DataError(f"{shown} has no images among its members: {inside}; check what is inside")
        self.num_dotted = sum(index.num_dotted for index in indexes)
        if self.num_dotted:
            log.warning("%s: %s", shown, self.dotted_text())

        labels = np.concatenate([index.labels for index in indexes])
        unlabelled = np.flatnonzero(labels == NO_LABEL)
        self.labels = None if len(unlabelled) else array("q", labels.tobytes())
        if len(unlabelled):
            self.why_no_labels = (
                f"{len(unlabelled)} of {len(self)} samples have no class index in .cls (text) or .json "
                f'("label" or "cls"), e.g. {self.name(int(unlabelled[0]))}'
            )
        self.class_names = None
        names_file = self._shards[0].path.parent / "classes.txt"
        if names_file.is_file():
            self.class_names = read_class_names(names_file)
            if self.labels is not None and max(self.labels) >= len(self.class_names):
                raise DataError(
                    f"{shown} has class index {max(self.labels)}, but {printable(str(names_file))} names only "
                    f"{len(self.class_names)} classes; complete or remove that file"
                )

    def __len__(self) -> int:
        return len(self._sizes)

    def dotted_text(self) -> str:
        """Describes the images with further dots in their names."""
        return (
            f"{self.num_dotted} of {len(self)} images have further dots in their names; each is read as a sample of its own, "
            "named up to its last dot (WebDataset would end the name at the first)"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def name(self, index: int) -> str:
        return printable(self.key(index))

    def key(self, index: int) -> str:
        return f"{self._paths[self._shard_of(index)]}:{self._names[index]}"

    def size(self, index: int) -> int:
        return int(self._sizes[index])

    def read(self, index: int) -> bytes:
        number = self._shard_of(index)
        size = int(self._sizes[index])
        try:
            # pread leaves the file position alone, so a forked process can share the handle.
            content = os.pread(self._handle(number).descriptor, size, int(self._offsets[index]))
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from error
        if len(content) < size:
            raise BadImageError(f"only {len(content)} of {size} bytes left: the shard changed after it was opened")
        return content

    def load(self, index: int) -> Image.Image:
        return decode_image(self.read(index), *self.decoding)

    def _shard_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return bisect_right(self._starts, index) - 1

    def _handle(self, number: int) -> _Handle:
        handle = self._handles.get(number)
        if handle is None:
            handle = _Handle(self._shards[number].tar)
            while len(self._handles) >= _MAX_OPEN_SHARDS:
                self._handles.pop(next(iter(self._handles)), None)
            self._handles[number] = handle
        return handle


class _Handle:
    """An open file. It is closed with its last reference, so a thread that is reading keeps it open."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
