"""Keeps images of remote shards on the local disk, within a limit that all remote data sets of a machine share.

A data set keeps its first shards, as many as fit when it is first opened; the rest is read from the server in each pass.
With random access nothing would be gained by dropping older images for newer ones. A kept shard is a sparse file into which
images are written as they are read; a byte for each image says whether it is there. Processes write the same bytes to the
same places, so they need no lock.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mae_et.data.sources.cache import CACHE_VARIABLE, cache_folder, cached_path, locked, replacing
from mae_et.errors import printable

log = logging.getLogger(__name__)

_RESERVED = "reserved.json"


class KeptImages:
    """The local part of a remote data set.

    Args:
        folder: of the data set in the cache folder; None: nothing is kept.
        num_shards: the first shards, which are kept.
        num_images: of the data set.
    """

    def __init__(self, folder: Path | None, num_shards: int, num_images: int) -> None:
        self.folder, self.num_shards, self.num_images = folder, num_shards, num_images
        self._present: np.ndarray | None = None
        if folder is not None and num_shards:
            try:
                path = folder / "present"
                if not path.exists() or path.stat().st_size != num_images:
                    with replacing(path) as file:
                        file.truncate(num_images)
                self._present = np.memmap(path, np.uint8, "r+")
            except OSError as error:
                self._stop(error)

    def __getstate__(self) -> tuple[Path | None, int, int]:
        return self.folder, self.num_shards, self.num_images

    def __setstate__(self, state: tuple[Path | None, int, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def get(self, index: int, shard: int, offset: int, size: int) -> bytes | None:
        """Returns `size` bytes of image `index`, which lie at `offset` of a shard; None if they are not here."""
        if self.folder is None or self._present is None or shard >= self.num_shards or not self._present[index]:
            return None
        try:
            with kept_path(self.folder, shard).open("rb") as file:
                content = os.pread(file.fileno(), size, offset)
        except OSError:
            return None
        # A power failure, or a removed cache folder, can leave a hole in the file: zeros.
        return content if len(content) == size and content.strip(b"\0") else None

    def put(self, index: int, shard: int, offset: int, content: bytes) -> None:
        """Keeps an image."""
        if self.folder is None or self._present is None or shard >= self.num_shards:
            return
        try:
            descriptor = os.open(kept_path(self.folder, shard), os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(descriptor, content, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._stop(error)
        else:
            self._present[index] = 1

    def mark(self, images: range) -> None:
        """Says that images are here."""
        if self._present is not None:
            self._present[images.start : images.stop] = 1

    def _stop(self, error: OSError) -> None:
        log.warning(
            "images cannot be kept in %s (%s), so each is read from the server again; set %s for another folder",
            self.folder, error.strerror or error, CACHE_VARIABLE,
        )  # fmt: skip
        self._present = None


def kept_path(folder: Path, shard: int) -> Path:
    """Returns the local file of a shard."""
    return folder / f"{shard:06d}.tar"


def set_folder(stem: str, identity: str) -> Path:
    """Returns the folder of a remote data set in the cache folder."""
    path = cached_path(stem, identity, "")
    return path.parent / "remote" / path.name


def reserve(folder: Path, shown: str, shard_sizes: Sequence[int], limit: int) -> int:
    """Reserves room for the first shards of a data set. The caller holds the lock of `folder`.

    Args:
        folder: of the data set.
        shown: its name, for messages.
        shard_sizes: bytes of each shard.
        limit: bytes for all data sets together. A reservation that was made stays as it is.
    Returns:
        The number of shards that are kept; 0 if the folder cannot be written.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return min(int(json.loads((folder / _RESERVED).read_text())["num_shards"]), len(shard_sizes))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / "all", "reserves room in the cache folder"):
            others = {path.parent: _reserved_bytes(path) for path in folder.parent.glob(f"*/{_RESERVED}")}
            used = sum(others.values())
            num_shards = int(np.searchsorted(np.cumsum(shard_sizes), limit - used, "right"))
            num_bytes = int(sum(shard_sizes[:num_shards]))
            with replacing(folder / _RESERVED) as file:
                file.write(json.dumps({"num_shards": num_shards, "bytes": num_bytes, "data": shown}).encode())
    except OSError as error:
        log.warning(
            "%s cannot be kept in %s (%s), so each image is read from the server again; set %s for another folder",
            shown, cache_folder(), error.strerror or error, CACHE_VARIABLE,
        )  # fmt: skip
        return 0
    if num_shards < len(shard_sizes):
        log.warning(
            "%s: %d of %d shards (%.3g of %.3g GB) are kept in %s, the others are read from the server in each pass. "
            "data.remote_cache_gib allows %.3g GB, of which other data sets have %.3g GB%s",
            shown, num_shards, len(shard_sizes), num_bytes / 1e9, sum(shard_sizes) / 1e9, folder, limit / 1e9, used / 1e9,
            "".join(f"; remove {printable(str(path))} if it is not needed" for path in list(others)[:3]),
        )  # fmt: skip
    return num_shards


def _reserved_bytes(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(path.read_text())["bytes"])
    return 0
