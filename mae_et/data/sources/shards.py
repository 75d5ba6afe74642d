"""Images in tar shards of the WebDataset layout, read in any order.

As in `sources.py`, what grows with the number of images is kept in flat buffers.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import json
import logging
import os
import re
import secrets
import tarfile
import time
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
from PIL import Image

from mae_et.data.decoding import IMAGE_EXTENSIONS, BadImageError, decode_image
from mae_et.data.sources.listing import NO_LABEL, PackedNames, nearest_folder
from mae_et.errors import DataError

try:
    import fcntl
except ImportError:  # not a POSIX system: no lock, the atomic rename alone keeps the cache whole
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "MAE_ET_CACHE"
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_INDEX_VERSION = 1
_MAX_OPEN_SHARDS = 64


class ShardSource:
    """Images in tar shards of the WebDataset layout, read in any order.

    A sample is what shares a member path up to the first dot of its base name: an image (by extension), and perhaps a
    class index as text in `.cls`, or in `.json` under "label" or "cls". Samples without an image are ignored; labels
    exist if every sample has one. A `classes.txt` beside the shards (line n, from 0, is class n) gives the class names.

    Each shard's headers are read once, and the index kept in the cache folder ($MAE_ET_CACHE, else
    ~/.cache/mae_et/shards). Gzip has no random access, so a compressed shard is decompressed there once. Cached files
    are named after path, size and time of the shard: one that changed is read anew. Between runs the folder may go.
    """

    labels: Sequence[int] | None
    class_names: Sequence[str] | None
    why_no_labels = ""

    def __init__(self, pattern: str, num_channels: int = 3) -> None:
        self.num_channels = num_channels
        self._shards = [_Shard.at(path) for path in _expand_shards(pattern)]
        _decompress_all(self._shards)
        indexes = [_indexed(shard) for shard in self._shards]
        self._starts = np.cumsum([0] + [len(index.sizes) for index in indexes], dtype=np.int64)
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._sizes = np.concatenate([index.sizes for index in indexes])
        lengths = np.concatenate([np.diff(index.name_ends, prepend=0) for index in indexes])
        self._names = PackedNames(b"".join(index.names.tobytes() for index in indexes), np.cumsum(lengths))
        self._handles: dict[int, _Handle] = {}
        if not len(self):
            raise DataError(
                f"{pattern} has no images ({', '.join(IMAGE_EXTENSIONS)}) among its members; check what is inside"
            )

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
            self.class_names = [line.strip() for line in names_file.read_text("utf-8").splitlines() if line.strip()]
            if self.labels is not None and max(self.labels) >= len(self.class_names):
                raise DataError(
                    f"{pattern} has class index {max(self.labels)}, but {names_file} names only "
                    f"{len(self.class_names)} classes; complete or remove that file"
                )

    def __len__(self) -> int:
        return len(self._sizes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def name(self, index: int) -> str:
        return f"{self._shards[self._shard_of(index)].path}:{self._names[index]}"

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
        return decode_image(self.read(index), self.num_channels)

    def _shard_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _handle(self, number: int) -> _Handle:
        handle = self._handles.get(number)
        if handle is None:
            handle = _Handle(self._shards[number].tar)
            while len(self._handles) >= _MAX_OPEN_SHARDS:
                self._handles.pop(next(iter(self._handles)), None)
            self._handles[number] = handle
        return handle


@dataclass(frozen=True)
class _Shard:
    """One shard and its places in the cache; `tar` is what gets read."""

    path: Path
    size: int
    compressed: bool
    tar: Path
    index: Path

    @classmethod
    def at(cls, path: Path) -> _Shard:
        try:
            status = path.stat()
            with path.open("rb") as file:
                compressed = file.read(2) == b"\x1f\x8b"  # by content: some .tar files are gzip, and the reverse
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
        digest = hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]
        stem = path.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
        cached = _cache_folder() / f"{stem}-{digest}.tar"
        return cls(path, status.st_size, compressed, cached if compressed else path, cached.with_suffix(".npz"))


@dataclass(frozen=True)
class _Index:
    """Flat arrays, one entry for each image of a shard; `names` is uint8, the member names one after the other."""

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: np.ndarray
    name_ends: np.ndarray
    tar_size: int


class _Handle:
    """An open file. Dropping the last reference closes it, so a thread that is reading keeps it open."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _cache_folder() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/mae_et/shards").expanduser()


def is_shard_name(path: str) -> bool:
    return path.lower().endswith(SHARD_SUFFIXES)


def _expand_shards(pattern: str) -> list[Path]:
    if Path(pattern).is_file():
        return [Path(pattern)]
    try:
        names = list(braceexpand.braceexpand(pattern, escape=False))
    except ValueError as error:
        raise DataError(
            f"{pattern} is no valid brace pattern ({error}); write e.g. train-{{000000..000004}}.tar"
        ) from error
    paths: list[Path] = []
    missing: list[str] = []
    for name in names:
        if Path(name).is_file():
            paths.append(Path(name))
        elif glob.has_magic(name):
            matches = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if is_shard_name(match)]
            paths += matches
            missing += [] if matches else [name]
        else:
            missing.append(name)
    if not paths:
        raise DataError(f"{pattern} matches no tar shard; {nearest_folder(Path(names[0]))}")
    if missing:
        listed = "\n".join(f"  - {name}" for name in missing)
        raise DataError(
            f"{pattern}: {len(missing)} of {len(names)} shards are missing; fetch them or narrow the pattern\n{listed}"
        )
    return paths


def _decompress_all(shards: Sequence[_Shard]) -> None:
    waiting = [shard for shard in shards if shard.compressed and not shard.tar.exists()]
    if not waiting:
        return
    packed = sum(shard.size for shard in waiting) / 1e6
    text = "decompressing %d shards (%.1f MB), %s to %s, into %s, once; $%s names another folder"
    logger.info(text, len(waiting), packed, waiting[0].path, waiting[-1].path, _cache_folder(), CACHE_VARIABLE)
    start = time.monotonic()
    for shard in waiting:
        _decompress(shard)
    plain = sum(shard.tar.stat().st_size for shard in waiting) / 1e6
    logger.info("decompressed %d shards: %.1f MB in %.1f s", len(waiting), plain, time.monotonic() - start)


def _decompress(shard: _Shard) -> None:
    try:
        shard.tar.parent.mkdir(parents=True, exist_ok=True)
        with _locked(shard.tar) as locked:
            if shard.tar.exists():  # another process was faster
                return
            if locked:
                for leftover in shard.tar.parent.glob(f"{glob.escape(shard.tar.name)}.*.partial"):
                    leftover.unlink(missing_ok=True)  # of a process that was killed
            with replacing(shard.tar) as file:
                for block in _gunzip(shard.path):
                    file.write(block)
    except OSError as error:
        raise DataError(
            f"{shard.path} is compressed and must be decompressed once, but the cache folder {shard.tar.parent} cannot "
            f"take it ({error.strerror or error}); set {CACHE_VARIABLE} to a writable folder with room for all shards, "
            "or decompress them yourself (gunzip) and name the .tar files"
        ) from error


def _gunzip(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                yield block
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path} is cut off or damaged ({error}); fetch or copy it again") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds a lock named after `path`. Where the file system has none, work may be done twice, but never wrongly."""
    lock = path.with_name(f"{path.name}.lock")
    with lock.open("wb") as file:
        locked = False
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
                locked = True
        try:
            yield locked
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A binary file that takes the place of `path` when all of it is written, and is removed otherwise."""
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


def _indexed(shard: _Shard, retry: bool = True) -> _Index:
    index = _load_index(shard)
    if index is None:
        try:
            index = index_tar(shard.tar)
        except (tarfile.TarError, OSError) as error:
            if shard.compressed:
                shard.tar.unlink(missing_ok=True)
                if retry:  # the cached copy may be what is damaged
                    _decompress(shard)
                    return _indexed(shard, retry=False)
            raise DataError(f"{shard.path} is cut off or damaged ({error}); fetch or copy it again") from error
        try:
            shard.index.parent.mkdir(parents=True, exist_ok=True)
            with replacing(shard.index) as file:
                np.savez(file, version=np.int64(_INDEX_VERSION), **vars(index))
        except OSError as error:
            text = (
                "the index of %s cannot be kept in %s (%s), so the next start reads it again; $%s names another folder"
            )
            logger.warning(text, shard.path, shard.index.parent, error.strerror or error, CACHE_VARIABLE)
    return index


def _load_index(shard: _Shard) -> _Index | None:
    """The cached index, or None if there is none, or none that fits the tar file."""
    try:
        with np.load(shard.index, allow_pickle=False) as stored:
            if int(stored["version"]) != _INDEX_VERSION or int(stored["tar_size"]) != shard.tar.stat().st_size:
                return None
            arrays = {key: stored[key] for key in ("offsets", "sizes", "labels", "names", "name_ends")}
            return _Index(**arrays, tar_size=int(stored["tar_size"]))
    except Exception:  # a damaged file raises anything; the index is made anew
        return None


def index_tar(path: Path) -> _Index:
    """Reads all headers of a plain tar. Raises tarfile.TarError if it is cut off or damaged."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    ordered: list[dict[str, tarfile.TarInfo]] = []
    with tarfile.open(path, "r:") as tar, path.open("rb") as file:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps every header in memory
            key, kind = _key_and_kind(member.name)
            if not member.isreg() or not key:
                continue
            if key not in samples or kind in samples[key]:
                samples[key] = {}
                ordered.append(samples[key])
            samples[key][kind] = member
        # tarfile takes the first bad header for the end. The real end is marked by a block of zeros.
        file.seek(tar.offset)
        if file.read(512) != bytes(512):
            raise tarfile.ReadError(f"no end mark at byte {tar.offset}")

        images, labels = [], array("q")
        for sample in ordered:
            image = next((sample[kind] for kind in sample if kind in IMAGE_EXTENSIONS), None)
            if image is not None:
                images.append(image)
                labels.append(_read_label(file.fileno(), sample))
    names = [os.fsencode(image.name) for image in images]
    if len(images) < len(ordered):
        logger.info("%s: %d samples without an image are ignored", path, len(ordered) - len(images))
    return _Index(
        offsets=np.array([image.offset_data for image in images], np.int64),
        sizes=np.array([image.size for image in images], np.int64),
        labels=np.array(labels, np.int64),
        names=np.frombuffer(b"".join(names), np.uint8),
        name_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        tar_size=path.stat().st_size,
    )


def _key_and_kind(name: str) -> tuple[str, str]:
    """`a/b.seg.PNG` -> (`a/b`, `seg.png`), as WebDataset has it; an empty key for hidden members and its meta files."""
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    if not stem or "__MACOSX" in name or re.match(r"__[^/]*__($|/)", name):
        return "", ""
    return f"{folder}{slash}{stem}", kind.lower()


def _read_label(descriptor: int, sample: dict[str, tarfile.TarInfo]) -> int:
    def read(member: tarfile.TarInfo) -> str:
        return os.pread(descriptor, member.size, member.offset_data).decode("utf-8", "replace")

    with contextlib.suppress(ValueError):
        if "cls" in sample:
            return max(NO_LABEL, int(read(sample["cls"])))
    with contextlib.suppress(ValueError):
        if "json" in sample:
            content = json.loads(read(sample["json"]))
            for key in ("label", "cls"):
                value = content.get(key) if isinstance(content, dict) else None
                if isinstance(value, (int, str)) and not isinstance(value, bool):
                    return max(NO_LABEL, int(value))
    return NO_LABEL
