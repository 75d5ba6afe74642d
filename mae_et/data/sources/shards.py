"""Images in tar shards of the WebDataset layout, read in any order.

As in `folder.py`, what grows with the number of images is kept in flat buffers.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_et.data.arrays import ImageArray, decode
from mae_et.data.decoding import BadImageError, Decoding
from mae_et.data.sources.listing import NO_LABEL, LeftOut, read_class_names
from mae_et.data.sources.shard_cache import open_index
from mae_et.data.sources.shard_index import IndexedShard, ShardIndex
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

    The index that `mae-et prepare` writes beside shards is mapped. Without it the headers of each shard are read once, and
    the index is kept in the cache folder (see `cache.py`). Gzip has no random access, so a compressed shard is decompressed
    there once.

    Args:
        pattern: one shard, or a brace or glob pattern.
        decoding: how the images are decoded.
        max_shards: limit for the number of shards.
        max_unpack_ratio: limit for the size of a gzip shard's content over its own; the first 64 MiB are always taken.
    Raises:
        DataError: if shards are missing, damaged, above a limit or without images, or labels cannot be used.
    """

    labels: np.ndarray | None  # [N] int32
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
        shards, index = open_index(expand_shards(pattern, max_shards), max_unpack_ratio)
        self._tars = [shard.tar for shard in shards]
        self._handles: dict[int, _Handle] = {}
        names_file = shards[0].path.parent / "classes.txt"
        class_names = read_class_names(names_file) if names_file.is_file() else None
        self._use(pattern, decoding, [str(shard.path) for shard in shards], shards, index, class_names, str(names_file))

    def _use(
        self,
        pattern: str,
        decoding: Decoding,
        paths: Sequence[str],
        shards: Sequence[IndexedShard],
        index: ShardIndex,
        class_names: Sequence[str] | None,
        names_file: str,
    ) -> None:
        """Takes the images of some shards of an index."""
        self.decoding, self._paths, self._index, self.class_names = decoding, paths, index, class_names
        numbers = [index.number(shard, position) for position, shard in enumerate(shards)]
        rows = [index.rows(number) for number in numbers]
        self._first_rows = array("q", (part.start for part in rows))
        self._starts = array("q", accumulate(map(len, rows), initial=0))
        self.left_out = LeftOut()
        for number in numbers:
            self.left_out.update(index.left_out(number))
        shown = printable(pattern)
        if not len(self):
            inside = self.left_out.describe() or "there are none"
            raise DataError(f"{shown} has no images among its members: {inside}; check what is inside")
        self.num_dotted = sum(map(index.num_dotted, numbers))
        if self.num_dotted:
            log.warning("%s: %s", shown, self.dotted_text())

        if all(before.stop == after.start for before, after in pairwise(rows)):  # a view of the mapped file
            labels = index.labels[rows[0].start : rows[-1].stop]
        else:
            labels = np.concatenate([index.labels[part.start : part.stop] for part in rows])
        unlabelled = np.flatnonzero(labels == NO_LABEL)
        self.labels = None if len(unlabelled) else labels
        if len(unlabelled):
            self.why_no_labels = (
                f"{len(unlabelled)} of {len(self)} samples have no class index in .cls (text) or .json "
                f'("label" or "cls"), e.g. {self.name(int(unlabelled[0]))}'
            )
        elif class_names is not None and (highest := int(labels.max())) >= len(class_names):
            raise DataError(
                f"{shown} has class index {highest}, but {printable(names_file)} names only {len(class_names)} classes; "
                "complete or remove that file"
            )

    def __len__(self) -> int:
        return self._starts[-1]

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
        number, row = self._place(index)
        return f"{self._paths[number]}:{self._index.names[row]}"

    def size(self, index: int) -> int:
        return int(self._index.sizes[self._place(index)[1]])

    def read(self, index: int) -> bytes:
        number, row = self._place(index)
        size = int(self._index.sizes[row])
        try:
            # pread leaves the file position alone, so a forked process can share the handle.
            content = os.pread(self._handle(number).descriptor, size, int(self._index.offsets[row]))
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from error
        if len(content) < size:
            raise BadImageError(f"only {len(content)} of {size} bytes left: the shard changed after it was opened")
        return content

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Asks the system to read images from the disk; neighbours in one piece."""
        if not hasattr(os, "posix_fadvise"):
            return
        for number, run in itertools.groupby(sorted(set(indices)), lambda index: self._place(index)[0]):
            places = [self._place(index)[1] for index in run]
            with contextlib.suppress(OSError):  # `read` reports it
                descriptor = self._handle(number).descriptor
                for first, last in _runs(places):
                    start = int(self._index.offsets[first])
                    end = int(self._index.offsets[last]) + int(self._index.sizes[last])
                    os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)

    def load(self, index: int) -> Image.Image | ImageArray:
        return decode(self.read(index), self.decoding)

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the position of an image's shard and the image's row in the index."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        return number, self._first_rows[number] + index - self._starts[number]

    def _handle(self, number: int) -> _Handle:
        handle = self._handles.get(number)
        if handle is None:
            handle = _Handle(self._tars[number])
            while len(self._handles) >= _MAX_OPEN_SHARDS:
                self._handles.pop(next(iter(self._handles)), None)
            self._handles[number] = handle
        return handle


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields the first and the last number of each run of consecutive numbers; `numbers` ascend."""
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        yield members[0], members[-1]


class _Handle:
    """An open file. It is closed with its last reference, so a thread that is reading keeps it open."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
