"""The cache of tar shards: unpacked copies and indexes, each made by one process while the others wait.

Cached files are named after path, size and time of the shard, so a shard that changed is read again. Lock files stay: a
process that waits on a removed file would hold a lock that nobody else sees.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import json
import logging
import os
import secrets
import tarfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from mae_et.data.sources.listing import LeftOut
from mae_et.data.sources.tar_index import TarIndex, index_tar
from mae_et.errors import DataError, printable

log = logging.getLogger(__name__)

CACHE_VARIABLE = "MAE_ET_CACHE"
_INDEX_VERSION = 2
_ARRAYS = ("offsets", "sizes", "labels", "names", "name_ends")
_ALWAYS_UNPACKED = 64 << 20  # bytes: small files of zeros have any ratio
_SECONDS_BEFORE_MESSAGE = 2.0


@dataclass(frozen=True)
class Shard:
    """One shard and its files in the cache. `tar` is what gets read."""

    path: Path
    size: int
    is_compressed: bool
    tar: Path
    index: Path

    @classmethod
    def at(cls, path: Path) -> Shard:
        """Returns the shard at a path; raises DataError if it cannot be read."""
        try:
            status = path.stat()
            with path.open("rb") as file:
                is_compressed = file.read(2) == b"\x1f\x8b"  # by content: some .tar files are gzip, and the reverse
        except OSError as error:
            raise DataError(f"{printable(str(path))} cannot be read: {error.strerror or error}") from error
        identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
        digest = hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]
        stem = path.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
        cached = _cache_folder() / f"{stem}-{digest}.tar"
        return cls(path, status.st_size, is_compressed, cached if is_compressed else path, cached.with_suffix(".npz"))

    def __str__(self) -> str:
        return printable(str(self.path))


def index_shards(paths: Sequence[Path], max_unpack_ratio: float) -> tuple[list[Shard], list[TarIndex]]:
    """Unpacks and indexes shards, or takes both from the cache.

    Args:
        paths: the shards.
        max_unpack_ratio: limit for the size of a compressed shard's content over its own.
    Returns:
        The shards and their indexes.
    Raises:
        DataError: if a shard is damaged or unpacks to too much, or the cache folder cannot take it.
    """
    shards = [Shard.at(path) for path in paths]
    packed = [shard for shard in shards if shard.is_compressed and not shard.tar.exists()]
    if packed:
        log.info(
            "decompressing %d shards (%.1f MB), %s to %s, into %s, once; set %s for another folder",
            len(packed), sum(shard.size for shard in packed) / 1e6, packed[0], packed[-1], _cache_folder(), CACHE_VARIABLE,
        )  # fmt: skip
    start = time.monotonic()
    indexes = [_indexed(shard, max_unpack_ratio) for shard in shards]
    if packed:
        size = sum(shard.tar.stat().st_size for shard in packed) / 1e6
        log.info("decompressed %d shards: %.1f MB in %.1f s", len(packed), size, time.monotonic() - start)
    return shards, indexes


def _indexed(shard: Shard, max_unpack_ratio: float) -> TarIndex:
    index = _load_index(shard)
    if index is None:
        with _locked(shard) as is_locked:
            if is_locked:
                for leftover in shard.index.parent.glob(f"{glob.escape(shard.index.stem)}.*.partial"):
                    leftover.unlink(missing_ok=True)  # of a process that was killed
            index = _load_index(shard) or _make_index(shard, max_unpack_ratio)
    return index


def _make_index(shard: Shard, max_unpack_ratio: float) -> TarIndex:
    """Indexes a shard, and keeps the index if the cache folder can be written. The caller holds the lock."""
    was_unpacked = shard.is_compressed and shard.tar.exists()
    if shard.is_compressed and not was_unpacked:
        _decompress(shard, max_unpack_ratio)
    try:
        index = index_tar(shard.tar, shard.path)
    except (tarfile.TarError, OSError) as error:
        if shard.is_compressed:
            shard.tar.unlink(missing_ok=True)
            if was_unpacked:  # the copy in the cache may be what is damaged
                return _make_index(shard, max_unpack_ratio)
        raise DataError(f"{shard} is cut off or damaged ({error}); download or copy it again") from error
    arrays: dict[str, Any] = {name: getattr(index, name) for name in _ARRAYS}
    arrays |= {"version": _INDEX_VERSION, "tar_size": index.tar_size, "num_dotted": index.num_dotted}
    try:
        shard.index.parent.mkdir(parents=True, exist_ok=True)
        with replacing(shard.index) as file:
            np.savez(file, **arrays, left_out=json.dumps(index.left_out.to_list()))
    except OSError as error:
        log.warning(
            "the index of %s cannot be kept in %s (%s), so the next start reads it again; set %s for another folder",
            shard, shard.index.parent, error.strerror or error, CACHE_VARIABLE,
        )  # fmt: skip
    return index


def _load_index(shard: Shard) -> TarIndex | None:
    """Returns the cached index, or None if there is none that fits the tar file."""
    try:
        with np.load(shard.index, allow_pickle=False) as stored:
            if int(stored["version"]) != _INDEX_VERSION or int(stored["tar_size"]) != shard.tar.stat().st_size:
                return None
            return TarIndex(
                **{name: stored[name] for name in _ARRAYS},
                tar_size=int(stored["tar_size"]),
                left_out=LeftOut.from_list(json.loads(str(stored["left_out"]))),
                num_dotted=int(stored["num_dotted"]),
            )
    except Exception:  # a damaged file leads numpy to any exception; the index is made again
        return None


def _decompress(shard: Shard, max_unpack_ratio: float) -> None:
    limit = max(_ALWAYS_UNPACKED, shard.size * max_unpack_ratio)
    try:
        shard.tar.parent.mkdir(parents=True, exist_ok=True)
        with replacing(shard.tar) as file:
            for block in _gunzip(shard):
                file.write(block)
                if file.tell() > limit:
                    raise DataError(
                        f"{shard} unpacks to more than {limit / 1e6:.0f} MB from {shard.size / 1e6:.1f} MB, above the limit of "
                        f"{max_unpack_ratio:g} times its size; check the file, or raise data.max_unpack_ratio"
                    )
    except OSError as error:
        raise DataError(
            f"{shard} is compressed and must be decompressed once, but the cache folder {shard.tar.parent} cannot "
            f"take it ({error.strerror or error}); set {CACHE_VARIABLE} to a writable folder with room for all shards, "
            "or decompress them yourself (gunzip) and name the .tar files"
        ) from error


def _gunzip(shard: Shard) -> Iterator[bytes]:
    try:
        with gzip.open(shard.path, "rb") as stream:
            while block := stream.read(1 << 20):
                yield block
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{shard} is cut off or damaged ({error}); download or copy it again") from error


@contextlib.contextmanager
def _locked(shard: Shard) -> Iterator[bool]:
    """Holds the shard's lock; yields False where the file system has none: work may then be repeated, but stays right."""
    lock = FileLock(shard.index.with_suffix(".lock"))
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):
            shard.index.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=_SECONDS_BEFORE_MESSAGE)
            except Timeout:
                log.info("waiting for another process that indexes %s", shard)
                lock.acquire()
            stack.callback(lock.release)
        yield lock.is_locked


def _cache_folder() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/mae_et/shards").expanduser()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """Opens a binary file that takes the place of `path` when all of it is written, and is removed otherwise."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
