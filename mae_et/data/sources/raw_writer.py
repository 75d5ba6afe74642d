"""Writes images as raw shards (see raw.py): shuffled once, by several processes or machines, resumable.

The header is written first, then each shard: its pixels, and its index when they are on disk. So a shard with an index is
whole. It is compared with its checksums when the same call is repeated, and written again if it differs.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_et.data.arrays import ImageArray
from mae_et.data.decoding import BadImageError
from mae_et.data.overlap import evenly_spread
from mae_et.data.sources.listing import NO_LABEL, some_of
from mae_et.data.sources.raw import RAW_SUFFIX, RawHeader, RawIndex, RawOptions, index_path, pixels_path
from mae_et.data.sources.shard_cache import replacing
from mae_et.data.sources.shard_pool import write_in_processes
from mae_et.data.sources.shard_writer import changed_keys, fitted_size
from mae_et.data.sources.source import ImageSource
from mae_et.errors import DataError, UserError, printable

_NUM_MEASURED = 128  # images whose sizes give the expected size of the set
_MAX_SIDE = 1 << 15  # px


@dataclass
class RawResult:
    """The counts of one shard."""

    num_images: int = 0
    num_reduced: int = 0  # images among them that are larger than the largest level
    num_bytes: int = 0  # of pixels
    num_outside: int = 0  # images with values beyond the value range, which were clipped
    skipped: list[list[str]] = field(default_factory=list)  # [name, reason] of unreadable images
    fault: str = ""  # why an existing shard was written again


class RawJob:
    """A raw set to write, or the part of it that one machine writes.

    Args:
        source: the images, opened with the number of channels of the options, and as float32 for uint16.
        folder: of the set.
        name: of the set.
        options: must be equal in each call for the same set.
        part: (i, n), 1 <= i <= n: this machine writes every n-th shard, beginning with the i-th.
    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(
        self, source: ImageSource, folder: Path, name: str, options: RawOptions, part: tuple[int, int] = (1, 1)
    ) -> None:
        _check(options, part)
        self.source, self.folder, self.name, self.options = source, folder, name, options
        listing = "".join(json.dumps(source.key(index)) + "\n" for index in range(len(source))).encode()
        value_range, class_names = source.decoding.value_range, source.class_names
        self.header = RawHeader(
            options=options,
            num_images=len(source),
            listing_sha256=hashlib.sha256(listing).hexdigest(),
            labelled=source.labels is not None,
            value_range=None if value_range is None else list(value_range),
            class_names=None if class_names is None or source.labels is None else list(class_names),
        )
        self.numbers = range(part[0] - 1, self.header.num_shards, part[1])
        order = np.random.default_rng(options.seed).permutation(len(source))
        self.shards = np.array_split(order, self.header.num_shards)

    @property
    def header_path(self) -> Path:
        return self.folder / f"{self.name}{RAW_SUFFIX}"

    def expected_bytes(self) -> int:
        """Estimates the size of the pixels that this job writes, from the sizes of some images."""
        sizes = []
        for index in evenly_spread(len(self.source), _NUM_MEASURED):
            with contextlib.suppress(BadImageError):
                image = self.source.load(index)
                sizes.append((image.width, image.height))
        pixels = sum(np.prod(fitted_size(size, level)) for size in sizes for level in self.options.sizes)
        num_images = sum(len(self.shards[number]) for number in self.numbers)
        return int(pixels * self.options.pixel_bytes / max(1, len(sizes)) * num_images)

    def pixel_paths(self, number: int) -> list[Path]:
        return [pixels_path(self.folder, self.name, number, size) for size in self.options.sizes]

    def check_space(self, expected: int) -> None:
        """Raises UserError if the folder's disk has less room than `expected` bytes, files of this job included."""
        there = [path for number in self.numbers for path in self.pixel_paths(number) if path.is_file()]
        existing = next(folder for folder in (self.folder, *self.folder.resolve().parents) if folder.is_dir())
        needed, free = expected - sum(path.stat().st_size for path in there), shutil.disk_usage(existing).free
        if needed > free:
            raise UserError(
                f"{printable(str(self.folder))} needs {needed / 1e9:.3g} GB more for the pixels, and its disk has "
                f"{free / 1e9:.3g} GB free: free some, name another folder, or choose smaller --sizes"
            )


def write_raw(
    job: RawJob,
    num_processes: int = 1,
    max_bad_fraction: float = 0.01,
    progress: Callable[[int], Any] = lambda num_images: None,
) -> list[RawResult]:
    """Writes the shards of a job, or resumes where an earlier call was stopped.

    Args:
        job: what to write.
        num_processes: each reads, resizes and writes one shard at a time.
        max_bad_fraction: limit for the share of unreadable images; above it the work stops.
        progress: called repeatedly with the number of images handled since the last call.
    Returns:
        The result of each shard of the job, in order. The same options and images give the same bytes.
    Raises:
        UserError: if the folder holds a set of this name with other options or images.
        DataError: if too many images are unreadable, or the folder cannot be written.
    """
    results: dict[int, RawResult] = {}
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        _write_header(job)
        for number in job.numbers:
            for leftover in job.folder.glob(f"{glob.escape(job.name)}-{number:06d}*.partial"):
                leftover.unlink(missing_ok=True)  # of a process that was killed
        for number, result in write_in_processes(_write_shard, job, job.numbers, num_processes, progress):
            results[number] = result
            _check_bad(job, results, max_bad_fraction)
    except OSError as error:
        raise DataError(
            f"{printable(str(job.folder))} cannot be written: {error.strerror or error}; correct that (free space, "
            "permissions), then run the same command again: finished shards are kept"
        ) from error
    return [results[number] for number in job.numbers]


def _check(options: RawOptions, part: tuple[int, int]) -> None:
    sizes = options.sizes
    if not sizes or list(sizes) != sorted(set(sizes), reverse=True) or not all(1 <= s <= _MAX_SIDE for s in sizes):
        raise UserError(f"sizes are {sizes}; give different sides in 1..{_MAX_SIDE} px, the largest first")
    if options.images_per_shard < 1 or options.seed < 0:
        raise UserError("images_per_shard must be at least 1, and seed at least 0")
    if not 1 <= part[0] <= part[1]:
        raise UserError(f"part is {part[0]}/{part[1]}; write I/N with 1 <= I <= N")


def _write_header(job: RawJob) -> None:
    path = job.header_path
    if not path.exists():
        foreign = sorted(file.name for file in job.folder.glob(f"{glob.escape(job.name)}-*.raw"))
        if foreign:
            raise UserError(
                f"{printable(str(job.folder))} holds {some_of(foreign)} without {path.name}; remove them, or name another folder"
            )
        with replacing(path) as file:
            file.write(job.header.to_json())
    stored = RawHeader.read(path)
    if stored != job.header:
        changes = changed_keys(json.loads(stored.to_json()), json.loads(job.header.to_json()))
        raise UserError(
            f"{printable(str(job.folder))} holds the raw set {job.name!r} with other options or images ({changes}); give the "
            "same ones, or another folder or name"
        )


def _check_bad(job: RawJob, results: dict[int, RawResult], max_bad_fraction: float) -> None:
    skipped = [f"{printable(name)}: {reason}" for result in results.values() for name, reason in result.skipped]
    if len(skipped) > max_bad_fraction * len(job.source):
        raise DataError(
            f"{len(skipped)} of {len(job.source)} images cannot be read, more than --max-bad-fraction {max_bad_fraction:g}: "
            f"{some_of(skipped)}. Raise that limit and run again to leave them out, or repair them, remove the set from "
            f"{printable(str(job.folder))} and start again"
        )


def _write_shard(job: RawJob, number: int, image_handled: Callable[[], None]) -> RawResult:
    """Writes one shard, unless it is there and equals its checksums."""
    fault = ""
    path = index_path(job.folder, job.name, number)
    if path.exists():
        try:
            index = RawIndex.read(path)
            fault = _fault(job, number, index)
        except DataError as error:
            fault = str(error)
        if not fault:
            for _ in job.shards[number]:
                image_handled()
            return _result(job, index)
        path.unlink()
    index = _write_pixels(job, number, image_handled)
    if read_back := _fault(job, number, index):
        raise DataError(f"{read_back} right after writing; the disk or its network may be faulty, run again")
    with replacing(path) as file:
        index.write(file)
    result = _result(job, index)
    result.fault = fault
    return result


def _write_pixels(job: RawJob, number: int, image_handled: Callable[[], None]) -> RawIndex:
    shapes: list[list[tuple[int, int]]] = []
    checksums, labels, names, is_reduced, shares_outside, skipped = [], [], [], [], [], []
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(replacing(path)) for path in job.pixel_paths(number)]
        for index in map(int, job.shards[number]):
            try:
                image = job.source.load(index)
                levels = list(_levels(image, job.options))
            except BadImageError as error:
                skipped.append([job.source.key(index), str(error)])
            else:
                blocks = [level.tobytes() for level in levels]
                for file, block in zip(files, blocks, strict=True):
                    file.write(block)
                shapes.append([level.shape[:2] for level in levels])
                checksums.append([zlib.crc32(block) for block in blocks])
                labels.append(NO_LABEL if job.source.labels is None else int(job.source.labels[index]))
                names.append(job.source.key(index).encode("utf-8", "surrogateescape"))
                is_reduced.append(levels[0].shape[:2] != (image.height, image.width))
                shares_outside.append(image.share_outside if isinstance(image, ImageArray) else 0.0)
            image_handled()
    num_levels = len(job.options.sizes)
    sides = np.array(shapes, np.int32).reshape(-1, num_levels, 2)
    return RawIndex(
        heights=sides[:, :, 0].T,
        widths=sides[:, :, 1].T,
        checksums=np.array(checksums, np.uint32).reshape(-1, num_levels).T,
        labels=np.array(labels, np.int64),
        names=np.frombuffer(b"".join(names), np.uint8),
        name_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        is_reduced=np.array(is_reduced, bool),
        skipped=np.frombuffer(json.dumps(skipped).encode(), np.uint8),
        digest=np.frombuffer(job.header.digest.encode(), np.uint8),
        shares_outside=np.array(shares_outside, np.float32),
    )


def _levels(image: Image.Image | ImageArray, options: RawOptions) -> Iterator[np.ndarray]:
    """Yields the pixels of an image at each level, [H, W, C]; each is made from the image itself, not from the level above."""
    whole = (image.width, image.height)
    bands = [image] if isinstance(image, Image.Image) else _bands(image.read())
    for size in options.sizes:
        fitted = fitted_size(whole, size)
        resized = [band if fitted == whole else band.resize(fitted, Image.Resampling.LANCZOS) for band in bands]
        pixels = np.dstack([np.asarray(band) for band in resized])
        if options.dtype == "uint16":  # Lanczos leaves the range at edges
            pixels = (pixels.clip(0, 1) * 65535 + 0.5).astype("<u2")
        yield pixels


def _bands(pixels: np.ndarray) -> list[Image.Image]:
    """Returns each channel of [H, W, C] uint8 or float32 as a grey picture."""
    return [Image.fromarray(np.ascontiguousarray(pixels[..., channel])) for channel in range(pixels.shape[2])]


def _fault(job: RawJob, number: int, index: RawIndex) -> str:
    """Returns how the pixels of a shard differ from its index, or "" if they do not."""
    if index.digest.tobytes().decode() != job.header.digest:
        return f"{index_path(job.folder, job.name, number).name} belongs to another set"
    block_bytes = index.block_bytes(job.options.pixel_bytes)
    for path, sizes, checksums in zip(job.pixel_paths(number), block_bytes, index.checksums, strict=True):
        if not path.is_file() or path.stat().st_size != sizes.sum():
            return f"{path.name} is missing or has not {sizes.sum()} bytes"
        start = 0
        with path.open("rb") as file:
            for size, checksum in zip(map(int, sizes), map(int, checksums), strict=True):
                if zlib.crc32(file.read(size)) != checksum:
                    return f"block {start}..{start + size} of {path.name} differs from its checksum"
                start += size
    return ""


def _result(job: RawJob, index: RawIndex) -> RawResult:
    return RawResult(
        num_images=len(index.labels),
        num_reduced=int(index.is_reduced.sum()),
        num_bytes=int(index.block_bytes(job.options.pixel_bytes).sum()),
        num_outside=int((index.shares_outside > 0).sum()),
        skipped=json.loads(index.skipped.tobytes()),
    )
