"""Images stored as pixels: raw shards, of which a loader reads the rows of a crop and decodes nothing.

A set NAME is, in one folder:

    NAME.raw.json            the header: options, number of images and shards, class names
    NAME-000000.raw.npz      the index of a shard: sizes, checksums, labels and names of its images
    NAME-000000-256.raw      its pixels at a level: [H, W, C] of one image after the other, uint8, or uint16 (little-endian) for
                             the value range in 65,536 steps

A level is a limit for the shorter side in px: larger images are resized to it, others are stored as they are. A set with
several levels is a pyramid. A block is one image at one level. It has a CRC-32, which is compared when a run first reads it.

Shapes: L levels from the largest to the smallest, N images, H and W of an image at a level, C channels.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from mae_et.data.arrays import ImageArray, array_image
from mae_et.data.box import scaled_box
from mae_et.data.decoding import BadImageError, Decoding
from mae_et.data.sources.listing import NO_LABEL, LeftOut, PackedNames, some_of
from mae_et.errors import DataError, UserError, printable
from mae_et.models.sizes import Size, as_size, size_text

RAW_SUFFIX = ".raw.json"
_FORMAT = 1
_MAX_OPEN_FILES = 64
_REPAIR = "run the `mae-et prepare` command of this set again: it writes that shard again and keeps the others"


@dataclass(frozen=True)
class RawOptions:
    """The options that determine the bytes of a raw set, apart from the images."""

    sizes: tuple[int, ...] = (256,)  # px, shorter side of each level, from the largest
    num_channels: int = 3
    images_per_shard: int = 4000  # upper limit
    seed: int = 0  # of the order
    dtype: Literal["uint8", "uint16"] = "uint8"  # of the pixels

    @property
    def pixel_bytes(self) -> int:
        """Size of a pixel with all its channels, bytes."""
        return self.num_channels * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class RawHeader:
    """What describes a raw set as a whole."""

    options: RawOptions
    num_images: int  # of the source
    listing_sha256: str  # of the names of the source's images
    labelled: bool
    value_range: list[float] | None  # stored values (black, white) that the pixels span
    class_names: list[str] | None
    format: int = _FORMAT

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.options.images_per_shard)

    @property
    def digest(self) -> str:
        """SHA-256 of the header; each index holds it, so a shard of another set is noticed."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        values = asdict(self)
        if self.options.dtype == "uint8":  # as before there was another type, so that the digest is the same
            del values["options"]["dtype"]
        return (json.dumps(values, indent=1) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> RawHeader:
        """Reads a header; raises DataError if it is missing or damaged."""
        shown = printable(str(path))
        try:
            values = json.loads(path.read_text("utf-8"))
            if values.get("format") != _FORMAT:
                raise DataError(f"{shown} has format {values.get('format')!r}, and this version reads format {_FORMAT}")
            options = values.pop("options")
            options["sizes"] = tuple(options["sizes"])
            header = cls(RawOptions(**options), **values)
            assert header.num_shards > 0
            assert header.options.dtype in ("uint8", "uint16")
        except OSError as error:
            raise DataError(
                f"{shown} cannot be read: {error.strerror or error}; name the header of a raw set"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, AssertionError) as error:
            raise DataError(f"{shown} is not the header of a raw set ({error!r}); prepare the set again") from error
        return header


@dataclass(frozen=True)
class RawIndex:
    """The index of one shard. The order of the images is that of their pixels."""

    heights: np.ndarray  # [L, N] int32, px
    widths: np.ndarray  # [L, N] int32, px
    checksums: np.ndarray  # [L, N] uint32, CRC-32 of each block
    labels: np.ndarray  # [N] int64
    names: np.ndarray  # uint8, the names within the source one after the other
    name_ends: np.ndarray  # [N] int64
    is_reduced: np.ndarray  # [N] bool, whether the largest level is smaller than the image was
    skipped: np.ndarray  # uint8, JSON: [name, reason] of unreadable images
    digest: np.ndarray  # uint8, of the header
    # [N], share of an image's values beyond the value range, which were clipped; empty in sets of older versions
    shares_outside: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    def write(self, file: Any) -> None:
        np.savez(file, **vars(self))

    @classmethod
    def read(cls, path: Path) -> RawIndex:
        """Reads an index; raises DataError if it is damaged, which the checksums of its parts show."""
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                return cls(**arrays)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{printable(str(path))} is damaged ({error}); {_REPAIR}") from error

    def block_bytes(self, pixel_bytes: int) -> np.ndarray:
        """Returns the size of each block in bytes, [L, N] int64."""
        return self.heights.astype(np.int64) * self.widths * pixel_bytes


def index_path(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}-{number:06d}.raw.npz"


def pixels_path(folder: Path, name: str, number: int, size: int) -> Path:
    return folder / f"{name}-{number:06d}-{size}.raw"


class RawSource:
    """Images of a raw set, read in any order.

    Args:
        path: of the header.
        decoding: value_range must be that of the set. num_channels too, but grey is read as RGB and RGB as grey.
    Raises:
        DataError: if shards are missing, cut off, damaged or of another set.
    """

    why_no_labels = "they were prepared from images without labels"
    how_to_label = "prepare them from images in class folders"

    def __init__(self, path: Path, decoding: Decoding = Decoding()) -> None:  # noqa: B008
        import torch  # here, because the processes that write shards import this module and need no torch

        self.path, self.header = path, RawHeader.read(path)
        self.options, self.sizes = self.header.options, self.header.options.sizes
        self._is_deep = self.options.dtype == "uint16"
        self.decoding = decoding._replace(dtype="float32" if self._is_deep else "uint8")
        self._folder, self._name = path.parent, path.name[: -len(RAW_SUFFIX)]
        self._check_decoding()
        indexes = self._read_indexes()
        self._heights, self._widths, self._checksums = (
            np.concatenate([getattr(index, key) for index in indexes], axis=1)
            for key in ("heights", "widths", "checksums")
        )
        block_bytes = [index.block_bytes(self.options.pixel_bytes) for index in indexes]
        self._offsets = np.concatenate([np.cumsum(b, axis=1) - b for b in block_bytes], axis=1)
        self._shards = np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index.labels) for index in indexes])
        for number, sizes in enumerate(block_bytes):
            self._check_files(number, sizes.sum(axis=1))
        lengths = np.concatenate([np.diff(index.name_ends, prepend=0) for index in indexes])
        self._names = PackedNames(np.concatenate([index.names for index in indexes]), np.cumsum(lengths))
        self.any_reduced = any(index.is_reduced.any() for index in indexes)
        labels = np.concatenate([index.labels for index in indexes])
        self.labels: Sequence[int] | None = None if (labels == NO_LABEL).any() else labels
        self.class_names = self.header.class_names
        self.left_out = LeftOut()
        skipped = [name for index in indexes for name, _ in json.loads(index.skipped.tobytes())]
        if skipped:
            self.left_out.add("images that could not be read when the set was prepared", skipped, is_loss=True)
        # In shared memory, so that the loader's processes check each block once between them.
        self._checked = torch.zeros(len(self.sizes), len(self), dtype=torch.uint8).share_memory_()
        self._descriptors: dict[tuple[int, int], _File] = {}

    def _check_decoding(self) -> None:
        shown, wanted, own = printable(str(self.path)), self.decoding.value_range, self.header.value_range
        channels, num_channels = self.decoding.num_channels, self.options.num_channels
        if channels != num_channels and (self._is_deep or not {channels, num_channels} <= {1, 3}):
            raise DataError(
                f"{shown} holds images of {num_channels} channels, but model.in_chans is {channels}; set model.in_chans = "
                f"{num_channels}, or prepare it again with --channels {channels}"
            )
        if self._is_deep and wanted is None:
            raise DataError(f"{shown} holds 16-bit pixels; set data.value_range={own}, the range it was written with")
        if wanted is not None and list(wanted) != own:
            raise DataError(
                f"{shown} was written with the value range {own}, but data.value_range is {wanted}; its pixels are scaled "
                f"already, so prepare it again with that range, or {f'set {own}' if self._is_deep else 'unset it'}"
            )

    def _read_indexes(self) -> list[RawIndex]:
        indexes, missing = [], []
        for number in range(self.header.num_shards):
            path = index_path(self._folder, self._name, number)
            try:
                index = RawIndex.read(path)
            except FileNotFoundError:
                missing.append(path.name)
                continue
            if index.digest.tobytes().decode() != self.header.digest:
                raise DataError(
                    f"{printable(str(path))} belongs to a set that was written with other options or images than "
                    f"{self.path.name} says; remove the files {printable(self._name)}-* and {self.path.name}, and prepare "
                    "the set again"
                )
            indexes.append(index)
        if missing:
            raise DataError(
                f"{printable(str(self.path))} is written in part: {len(missing)} of {self.header.num_shards} shards have no "
                f"index ({some_of(missing)}); run the `mae-et prepare` command of this set again, or its parts that are "
                "missing (--part): finished shards are kept"
            )
        if not sum(len(index.labels) for index in indexes):
            raise DataError(f"{printable(str(self.path))} has no images: none could be read when it was prepared")
        return indexes

    def _check_files(self, number: int, expected: np.ndarray) -> None:
        for level, size in enumerate(self.sizes):
            path = pixels_path(self._folder, self._name, number, size)
            shown = printable(str(path))
            try:
                found = path.stat().st_size
            except OSError as error:
                raise DataError(
                    f"{shown}, the pixels at {size} px of a shard, cannot be read: {error.strerror or error}; {_REPAIR}"
                ) from error
            if found != expected[level]:
                raise DataError(
                    f"{shown} has {found} bytes, and its index {expected[level]}: it is cut off or was changed; {_REPAIR}"
                )

    def __len__(self) -> int:
        return self._heights.shape[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def name(self, index: int) -> str:
        return printable(self.key(index))

    def key(self, index: int) -> str:
        return f"{self._folder}/{self._name}-{self._shards[index]:06d}.raw:{self._names[index]}"

    def size(self, index: int) -> None:
        return None

    def read(self, index: int) -> None:
        return None

    def load(self, index: int) -> Image.Image | ImageArray:
        pixels = self._read_stored(index, (0, 0, *self.shape(index)), None)
        if self.decoding.is_picture:
            picture = self._converted(pixels)
            return Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture)
        return array_image(pixels, self.decoding)

    def shape(self, index: int) -> tuple[int, int]:
        """Returns the height and width of an image at the largest level, px."""
        return int(self._heights[0, index]), int(self._widths[0, index])

    def read_region(self, index: int, box: tuple[int, int, int, int], size: int | Size | None = None) -> np.ndarray:
        """Reads a part of an image, from the smallest level at which both its sides have `size` px.

        Args:
            index: of the image.
            box: top, left, height and width in px of the largest level. At another level it is rounded to whole px.
            size: that the part will be resized to, px, side or (h, w); None: of the largest level.
        Returns:
            [h, w, C] uint8, or float32 in [0, 1] of a set with 16 bits.
        Raises:
            BadImageError: if the shard cannot be read, is cut off, or differs from its checksum.
        """
        pixels = self._read_stored(index, box, size)
        if self._is_deep:
            return pixels.astype(np.float32) / np.float32(65535)
        return self._converted(pixels)

    def _read_stored(self, index: int, box: tuple[int, int, int, int], size: int | Size | None) -> np.ndarray:
        """Reads a part of an image as it is stored, [h, w, C]."""
        level = 0
        if size is not None and len(self.sizes) > 1:
            level = self._level(index, (box[2], box[3]), as_size(size))
        height, width = int(self._heights[level, index]), int(self._widths[level, index])
        if level:
            box = scaled_box(box, self.shape(index), (height, width))
        top, left, rows, columns = box
        row = width * self.options.pixel_bytes
        if self._checked.numpy()[level, index]:
            pixels = self._pread(index, level, top * row, rows * row)
        else:
            block = self._pread(index, level, 0, height * row)
            self._check(index, level, block)
            pixels = block[top * row : (top + rows) * row]
        stored = pixels.view(np.dtype(self.options.dtype).newbyteorder("<"))
        return stored.reshape(rows, width, self.options.num_channels)[:, left : left + columns]

    def _converted(self, region: np.ndarray) -> np.ndarray:
        """Turns 8-bit grey to RGB or RGB to grey where the run wants that, [h, w, C]."""
        rows, columns, channels = region.shape
        if channels == self.decoding.num_channels:
            return region
        mode = "L" if self.decoding.num_channels == 1 else "RGB"
        converted = np.asarray(Image.fromarray(region.squeeze(-1) if channels == 1 else region).convert(mode))
        return converted.reshape(rows, columns, self.decoding.num_channels)

    def check_sizes(self, sizes: Iterable[int | Size]) -> None:
        """Makes sure that no stage enlarges images that were reduced. Of a rectangle the shorter side counts.

        Args:
            sizes: that crops are resized to, px, side or (h, w).
        Raises:
            UserError: with the stages and the option to prepare the images with.
        """
        missing = sorted({size for size in map(as_size, sizes) if min(size) > self.sizes[0]})
        if missing and self.any_reduced:
            shown, largest = ", ".join(map(size_text, missing)), max(map(min, missing))
            levels = " ".join(map(str, (largest * 8 // 7, *self.sizes)))
            raise UserError(
                f"{printable(str(self.path))} holds pixels at {' and '.join(map(str, self.sizes))} px, but crops are resized "
                f"to {shown} px, so reduced images would be enlarged; prepare the set with --sizes {levels}, or lower "
                "data.image_size"
            )

    def _level(self, index: int, crop: Size, size: Size) -> int:
        """Returns the smallest level at which a crop has `size` px, or 0 where it has not that many at any."""
        shorter_sides = np.minimum(self._heights[:, index], self._widths[:, index]).tolist()
        for level in range(len(self.sizes) - 1, 0, -1):
            if all(crop[i] * shorter_sides[level] >= size[i] * shorter_sides[0] for i in (0, 1)):
                return level
        return 0

    def _check(self, index: int, level: int, block: np.ndarray) -> None:
        found, expected = zlib.crc32(block.data), int(self._checksums[level, index])
        if found != expected:
            start = int(self._offsets[level, index])
            path = pixels_path(self._folder, self._name, int(self._shards[index]), self.sizes[level])
            raise BadImageError(
                f"block {start}..{start + len(block)} of {printable(path.name)} has the checksum {found:08x}, not "
                f"{expected:08x}: the shard was changed or its disk is faulty; {_REPAIR}"
            )
        self._checked[level, index] = 1

    def _pread(self, index: int, level: int, start: int, num_bytes: int) -> np.ndarray:
        """Returns bytes of a block, [num_bytes] uint8."""
        number = int(self._shards[index])
        buffer = np.empty(num_bytes, np.uint8)
        try:
            file = self._descriptors.get((number, level)) or self._open(number, level)
            # Reading at a position leaves the file's own alone, so a forked process can share the descriptor.
            found = os.preadv(file.descriptor, [buffer.data], int(self._offsets[level, index]) + start)
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from error
        if found < num_bytes:
            raise BadImageError(f"only {found} of {num_bytes} bytes left: the shard changed after it was opened")
        return buffer

    def _open(self, number: int, level: int) -> _File:
        file = _File(pixels_path(self._folder, self._name, number, self.sizes[level]))
        while len(self._descriptors) >= _MAX_OPEN_FILES:
            self._descriptors.pop(next(iter(self._descriptors)), None)
        self._descriptors[number, level] = file
        return file


class _File:
    """An open file. It is closed with its last reference, so a thread that is reading keeps it open."""

    _close = staticmethod(os.close)  # the module may be gone when the interpreter ends

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # without it the system reads further rows ahead, which no crop needs
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            self._close(self.descriptor)
