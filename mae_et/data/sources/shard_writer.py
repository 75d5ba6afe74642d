"""Writes image files as resized tar shards: shuffled once, by several processes, resumable.

For a set named train, the folder of shards holds `train-000000.tar` and so on, `train-sources.jsonl` (line i: the path of the
image whose key is i), `train-manifest.json` (options, and the result of each shard), `train-index.safetensors` (where each image
lies, see `shard_index.py`), and `classes.txt`. A shard gets its name when all of it is on disk. It is done when it was read back
and listed in the manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_et.data.arrays import decode, is_array_file
from mae_et.data.decoding import IMAGE_EXTENSIONS, BadImageError, Decoding
from mae_et.data.sources.listing import some_of
from mae_et.data.sources.shard_cache import Shard, index_shards, keep_index, prepared_index_path, replacing
from mae_et.data.sources.shard_index import ShardIndex
from mae_et.data.sources.shard_pool import write_in_processes
from mae_et.data.sources.source import ImageSource
from mae_et.data.sources.tar_index import index_tar
from mae_et.errors import DataError, UserError, printable

_LONGEST_JPEG_SIDE = 65500  # px


@dataclass(frozen=True)
class ShardOptions:
    """The options that determine the bytes of the shards, apart from the images."""

    shorter_side: int = 256  # px; larger images are resized to it, others are not changed
    quality: int = 95  # of the JPEG files that are written
    images_per_shard: int = 4000  # upper limit
    seed: int = 0  # of the order

    def check(self) -> None:
        """Raises UserError if a value is out of range."""
        highest = {"shorter_side": _LONGEST_JPEG_SIDE, "quality": 100}
        for name, value in vars(self).items():
            low, high = 0 if name == "seed" else 1, highest.get(name, 10**9)
            if not low <= value <= high:
                raise UserError(f"{name} is {value}; set it in {low}..{high}")


@dataclass
class ShardResult:
    """The counts of one shard."""

    num_images: int = 0
    num_kept: int = 0  # images among them that were not resized
    source_bytes: int = 0
    tar_bytes: int = 0
    skipped: list[list[str]] = field(default_factory=list)  # [name, reason] of unreadable images


def write_shards(
    source: ImageSource,
    folder: Path,
    name: str,
    options: ShardOptions,
    num_processes: int = 1,
    max_bad_fraction: float = 0.01,
    progress: Callable[[int], Any] = lambda num_images: None,
) -> list[ShardResult]:
    """Writes a data set as shards, or resumes where an earlier call was stopped.

    Args:
        source: images that are files.
        folder: of the shards; created if missing.
        name: of the set; each file name begins with it.
        options: must be equal in each call for the same shards.
        num_processes: each reads, resizes and writes one shard at a time.
        max_bad_fraction: limit for the share of unreadable images; above it the work stops.
        progress: called repeatedly with the number of images handled since the last call; first with those of existing
            shards.
    Returns:
        The result of each shard, in order. The same options and images give the same bytes, also after interruptions.
    Raises:
        UserError: if options are out of range, or differ from those of existing shards.
        DataError: if the images are not files, too many are unreadable, or the folder cannot be written.
    """
    options.check()
    with contextlib.suppress(BadImageError):
        if source.read(0) is None:
            raise DataError(f"{source.name(0)}, ... are not image files; name a folder of images, or tar shards")
    job = _Job(source, folder, name, options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{glob.escape(name)}-*.partial"):
            leftover.unlink(missing_ok=True)  # of a process that was killed
        manifest = _Manifest.opened(job)
        progress(sum(result.num_images + len(result.skipped) for result in manifest.results.values()))
        manifest.check_bad(max_bad_fraction)
        for number, result in write_in_processes(_write_shard, job, manifest.waiting(), num_processes, progress):
            manifest.add(number, result)
            manifest.check_bad(max_bad_fraction)
        _write_index(job)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error.strerror or error}; correct that (free space, permissions), then run the "
            "same command again: finished shards are kept"
        ) from error
    return [manifest.results[number] for number in range(job.num_shards)]


def shard_pattern(folder: Path, name: str, num_shards: int) -> str:
    """Returns the value of `data.train` for these shards."""
    last = f"{num_shards - 1:06d}"
    return f"{folder}/{name}-{last if num_shards == 1 else f'{{000000..{last}}}'}.tar"


class _Job:
    """The work, as each process needs it."""

    def __init__(self, source: ImageSource, folder: Path, name: str, options: ShardOptions) -> None:
        self.source, self.folder, self.name, self.options = source, folder, name, options
        self.num_shards = -(-len(source) // options.images_per_shard)
        self.parts = np.array_split(np.random.default_rng(options.seed).permutation(len(source)), self.num_shards)

    def path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:06d}.tar"


class _Manifest:
    """The finished shards, in a file that is replaced after each shard."""

    def __init__(self, job: _Job, header: dict[str, Any], results: dict[int, ShardResult]) -> None:
        self.job, self.header, self.results = job, header, results

    @classmethod
    def opened(cls, job: _Job) -> _Manifest:
        """Returns the manifest of the folder's shards, or a new one beside the files that describe the set."""
        # JSON escapes bytes that are not UTF-8, so the names stay exact.
        listing = "".join(json.dumps(job.source.key(index)) + "\n" for index in range(len(job.source))).encode()
        header = {
            "options": dataclasses.asdict(job.options),
            "num_images": len(job.source),
            "listing_sha256": hashlib.sha256(listing).hexdigest(),
            "labelled": job.source.labels is not None,
            "value_range": job.source.decoding.value_range and list(job.source.decoding.value_range),
        }
        path = job.folder / f"{job.name}-manifest.json"
        if not path.exists():
            _refuse_foreign(job)
            _write_classes(job)
            with replacing(job.folder / f"{job.name}-sources.jsonl") as file:
                file.write(listing)
            manifest = cls(job, header, {})
            manifest.save()
            return manifest
        try:
            stored = json.loads(path.read_text("utf-8"))
            results = {int(number): ShardResult(**values) for number, values in stored.pop("shards").items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is damaged ({error}); remove the shards of {job.name!r} and start again"
            ) from error
        if stored != header:
            changes = changed_keys(stored, header)
            raise UserError(
                f"{job.folder} holds shards of {job.name!r} with other options or images ({changes}); give the same ones, or "
                "another folder or name"
            )
        return cls(
            job, header, {number: result for number, result in results.items() if cls._there(job, number, result)}
        )

    @staticmethod
    def _there(job: _Job, number: int, result: ShardResult) -> bool:
        path = job.path(number)
        return path.is_file() and path.stat().st_size == result.tar_bytes

    def waiting(self) -> list[int]:
        return [number for number in range(self.job.num_shards) if number not in self.results]

    def add(self, number: int, result: ShardResult) -> None:
        self.results[number] = result
        self.save()

    def save(self) -> None:
        shards = {str(number): dataclasses.asdict(self.results[number]) for number in sorted(self.results)}
        with replacing(self.job.folder / f"{self.job.name}-manifest.json") as file:
            file.write((json.dumps({**self.header, "shards": shards}, indent=1) + "\n").encode())

    def check_bad(self, max_bad_fraction: float) -> None:
        skipped = [
            f"{printable(name)}: {reason}" for result in self.results.values() for name, reason in result.skipped
        ]
        if len(skipped) > max_bad_fraction * len(self.job.source):
            raise DataError(
                f"{len(skipped)} of {len(self.job.source)} images cannot be read, more than --max-bad-fraction "
                f"{max_bad_fraction:g}: {some_of(skipped)}. Raise that limit and run again to leave them out, or repair them, "
                f"remove {self.job.folder} and start again"
            )


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Describes the differences between two headers."""
    old, new = ({**header, **header.get("options", {})} for header in (old, new))
    changed = [key for key in new if key != "options" and old.get(key) != new[key]]
    names = {"listing_sha256": "other image names"}
    return ", ".join(names.get(key, f"{key} was {old.get(key)}, is {new[key]}") for key in changed) or "other keys"


def _refuse_foreign(job: _Job) -> None:
    foreign = sorted(path.name for path in job.folder.glob(f"{glob.escape(job.name)}-*.tar"))
    if foreign:
        raise UserError(
            f"{job.folder} holds {some_of(foreign)} without a manifest, so another program made them; name another folder"
        )


def _write_classes(job: _Job) -> None:
    """Writes one class name per line, as ShardSource reads them."""
    if job.source.labels is None or not job.source.class_names:
        return
    odd = [
        name
        for name in job.source.class_names
        if not name.strip() or name != name.strip() or len(name.splitlines()) > 1
    ]
    if odd:
        raise DataError(f"class {odd[0]!r} cannot be a line of classes.txt; rename that folder")
    text = "".join(f"{name}\n" for name in job.source.class_names)
    path = job.folder / "classes.txt"
    if path.exists() and path.read_text("utf-8") != text:
        raise UserError(f"{path} names other classes than these images have; name another folder")
    with replacing(path) as file:
        file.write(text.encode())


def _write_index(job: _Job) -> None:
    """Writes the index of all shards in one file beside them, unless the one there fits."""
    shards = [Shard.at(job.path(number)) for number in range(job.num_shards)]
    path = prepared_index_path(shards[0].path)
    assert path is not None
    with contextlib.suppress(OSError, ValueError):
        ShardIndex.mapped(path).check_fits(shards)
        return
    index = ShardIndex.of(shards, index_shards(shards, max_unpack_ratio=1))
    with replacing(path) as file:
        index.write(file)
    for shard in shards:
        shard.index.unlink(missing_ok=True)  # the set has its own index now


def _write_shard(job: _Job, number: int, image_handled: Callable[[], None]) -> ShardResult:
    path = job.path(number)
    result, checksum = ShardResult(), 0
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index in map(int, job.parts[number]):
            try:
                content = job.source.read(index)
                assert content is not None
                suffix = job.source.key(index).rpartition(".")[2].lower()
                image, suffix = fit_image(
                    content, suffix, job.options.shorter_side, job.options.quality, job.source.decoding
                )
            except BadImageError as error:
                result.skipped.append([job.source.key(index), str(error)])
            else:
                if suffix not in IMAGE_EXTENSIONS:  # a list file may name any file, and a row of a table has no name
                    suffix = _format(image)
                _add(tar, f"{index:08d}.{suffix}", image)
                if job.source.labels is not None:
                    _add(tar, f"{index:08d}.cls", str(job.source.labels[index]).encode())
                result.num_images += 1
                result.num_kept += image is content
                result.source_bytes += len(content)
                checksum = zlib.crc32(image, checksum)
            image_handled()
    _check_written(path, result.num_images, checksum)
    result.tar_bytes = path.stat().st_size
    return result


def fit_image(
    content: bytes,
    suffix: str,
    shorter_side: int,
    quality: int,
    decoding: Decoding = Decoding(),  # noqa: B008
) -> tuple[bytes, str]:
    """Returns an image file at the wanted size.

    Args:
        content: of the image's file.
        suffix: of its name, without the dot.
        shorter_side: px. The content of an image that is not larger is returned unchanged, but
            DICOM and .npy become PNG. So is that of an image that a picture cannot hold, at any size: with more
            channels or deeper values.
        quality: of the JPEG file of a larger one; its colour has half the resolution (4:2:0).
        decoding: how the image is decoded.
    Returns:
        The content and its suffix.
    Raises:
        BadImageError: if the file cannot be read.
    """
    image = decode(content, decoding)
    if not isinstance(image, Image.Image):
        return content, suffix
    size = fitted_size(image.size, shorter_side)
    buffer = io.BytesIO()
    if size == image.size or max(size) > _LONGEST_JPEG_SIDE:
        if not is_array_file(content):
            return content, suffix
        image.save(buffer, "PNG")  # a shard of pictures and arrays would be read without the arrays
        return buffer.getvalue(), "png"
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue(), "jpg"


def _format(content: bytes) -> str:
    """Returns the usual suffix of an image file that can be read."""
    with Image.open(io.BytesIO(content)) as image:
        name = image.format or ""
        return {"JPEG": "jpg", "JPEG2000": "jp2"}.get(name, name.lower())


def fitted_size(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """Returns the width and height at which the shorter side is at most `shorter_side`, px."""
    scale = shorter_side / min(size)
    if scale >= 1:
        return size
    width, height = (max(1, round(side * scale)) for side in size)
    return width, height


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _check_written(path: Path, num_images: int, checksum: int) -> None:
    """Raises DataError if a shard does not hold the images that were written into it."""
    try:
        shard, index = Shard.at(path), index_tar(path)
        found = 0
        with path.open("rb") as file:
            for offset, size in zip(index.offsets, index.sizes, strict=True):
                file.seek(offset)
                found = zlib.crc32(file.read(size), found)
        if len(index.sizes) == num_images and found == checksum:
            keep_index(shard, index)  # for `_write_index`
            return
        reason = f"{len(index.sizes)} of {num_images} images, checksum {found:08x}, not {checksum:08x}"
    except tarfile.TarError as error:
        reason = str(error)
    os.unlink(path)
    raise DataError(f"{path} did not read back as written ({reason}); the disk or its network may be faulty, run again")
