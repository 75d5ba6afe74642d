"""The indexes of tar shards: beside prepared shards, or in the cache folder, with unpacked copies of compressed shards.

Cached files are named after path, size and time of the shard, so a shard that changed is read again.
"""

from __future__ import annotations

import glob
import gzip
import json
import logging
import re
import tarfile
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mae_et.data.sources.cache import CACHE_VARIABLE, cache_folder, cached_path, locked, replacing, warn_not_kept
from mae_et.data.sources.listing import LeftOut
from mae_et.data.sources.shard_index import HEAD_BYTES, ShardIndex, head_digest
from mae_et.data.sources.tar_index import TarIndex, index_tar
from mae_et.errors import DataError, printable

log = logging.getLogger(__name__)

_INDEX_VERSION = 2
_ARRAYS = ("offsets", "sizes", "labels", "names", "name_ends")
_ALWAYS_UNPACKED = 64 << 20  # bytes: small files of zeros have any ratio
_NUM_THREADS = 16  # hide the latency of network file systems


@dataclass(frozen=True)
class Shard:
    """One shard and its files in the cache. `tar` is what gets read."""

    path: Path
    size: int
    head: int  # digest of its first bytes
    is_compressed: bool
    tar: Path
    index: Path

    @classmethod
    def at(cls, path: Path) -> Shard:
        """Returns the shard at a path; raises DataError if it cannot be read."""
        try:
            status = path.stat()
            with path.open("rb") as file:
                head = file.read(HEAD_BYTES)
        except OSError as error:
            raise DataError(f"{printable(str(path))} cannot be read: {error.strerror or error}") from error
        is_compressed = head[:2] == b"\x1f\x8b"  # by content: some .tar files are gzip, and the reverse
        stem = path.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
        cached = cached_path(stem, f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}", ".tar")
        tar = cached if is_compressed else path
        return cls(path, status.st_size, head_digest(head), is_compressed, tar, cached.with_suffix(".npz"))

    def __str__(self) -> str:
        return printable(str(self.path))


def open_index(paths: Sequence[Path], max_unpack_ratio: float) -> tuple[list[Shard], ShardIndex]:
    """Maps the index of shards: the one beside prepared shards, or one that the cache folder has or gets.

    Of the processes of a machine one makes the index while the others wait.

    Args:
        paths: the shards.
        max_unpack_ratio: limit for the size of a compressed shard's content over its own.
    Returns:
        The shards and their index.
    Raises:
        DataError: if a shard is damaged or unpacks to too much, or the cache folder cannot take an unpacked one.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        shards = list(pool.map(Shard.at, paths))
    if (prepared := _prepared_index(shards)) is not None:
        return shards, prepared
    path = cached_path(shards[0].path.stem, "\n".join(shard.index.name for shard in shards), ".index")
    if (kept := _kept_index(path, shards)) is not None:
        return shards, kept
    with locked(path, f"indexes {shards[0]} to {shards[-1]}"):
        if (kept := _kept_index(path, shards)) is not None:
            return shards, kept
        index = ShardIndex.of(shards, index_shards(shards, max_unpack_ratio))
        try:
            with replacing(path) as file:
                index.write(file)
            return shards, ShardIndex.mapped(path)
        except OSError as error:
            warn_not_kept(f"the index of {shards[0]} to {shards[-1]}", error)
            return shards, index


def prepared_index_path(shard: Path) -> Path | None:
    """Returns where `mae-et prepare` writes the index of a shard's set: train-index.safetensors beside train-000000.tar."""
    match = re.fullmatch(r"(.+)-\d+\.tar", shard.name)
    return shard.with_name(f"{match[1]}-index.safetensors") if match else None


def _prepared_index(shards: Sequence[Shard]) -> ShardIndex | None:
    places = {prepared_index_path(shard.path) for shard in shards}
    path = places.pop()
    if places or path is None or not path.is_file():
        return None
    try:
        index = ShardIndex.mapped(path)
        index.check_fits(shards)
    except (OSError, ValueError) as error:
        log.warning(
            "%s is not used, the shards are indexed again: %s; run mae-et prepare again to write it",
            printable(str(path)), error,
        )  # fmt: skip
        return None
    return index


def _kept_index(path: Path, shards: Sequence[Shard]) -> ShardIndex | None:
    try:
        index = ShardIndex.mapped(path)
        for position, shard in enumerate(shards):
            number = index.number(shard, position)
            if shard.is_compressed and shard.tar.stat().st_size != index.tar_size(number):
                return None
    except (OSError, ValueError):  # it is made again
        return None
    return index


def index_shards(shards: Sequence[Shard], max_unpack_ratio: float) -> list[TarIndex]:
    """Unpacks and indexes shards, or takes both from the cache folder; arguments and errors as for `open_index`."""
    packed = [shard for shard in shards if shard.is_compressed and not shard.tar.exists()]
    if packed:
        log.info(
            "decompressing %d shards (%.1f MB), %s to %s, into %s, once; set %s for another folder",
            len(packed), sum(shard.size for shard in packed) / 1e6, packed[0], packed[-1], cache_folder(), CACHE_VARIABLE,
        )  # fmt: skip
    start = time.monotonic()
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        indexes = list(pool.map(lambda shard: _indexed(shard, max_unpack_ratio), shards))
    if packed:
        size = sum(shard.tar.stat().st_size for shard in packed) / 1e6
        log.info("decompressed %d shards: %.1f MB in %.1f s", len(packed), size, time.monotonic() - start)
    return indexes


def _indexed(shard: Shard, max_unpack_ratio: float) -> TarIndex:
    index = _load_index(shard)
    if index is None:
        with locked(shard.index, f"indexes {shard}") as is_locked:
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
    keep_index(shard, index)
    return index


def keep_index(shard: Shard, index: TarIndex) -> None:
    """Writes the index of a shard into the cache folder; a warning says if that is impossible."""
    arrays: dict[str, Any] = {name: getattr(index, name) for name in _ARRAYS}
    arrays |= {"version": _INDEX_VERSION, "tar_size": index.tar_size, "num_dotted": index.num_dotted}
    try:
        shard.index.parent.mkdir(parents=True, exist_ok=True)
        with replacing(shard.index) as file:
            np.savez(file, **arrays, left_out=json.dumps(index.left_out.to_list()))
    except OSError as error:
        warn_not_kept(f"the index of {shard}", error)


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
