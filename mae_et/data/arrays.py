"""Images that a Pillow picture cannot hold: any number of channels, and values of more than 8 bits.

`decode` is the one place that chooses how a file is read, by its content and by how the run wants its images:

    8 bits, 1 or 3 channels     a Pillow picture (`decode_image`); DICOM and .npy become one
    all others                  an `ImageArray`, of which a part can be read

Shapes: H x W px of the image, h x w of a region, C channels.
"""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from mae_et.data.decoding import (
    BadImageError,
    Decoding,
    ImageFacts,
    decode_image,
    examine_image,
    explained,
    number_of_values,
    opened,
    pillow_values,
    read_file,
    upright,
)
from mae_et.data.dicom import is_dicom, read_dicom
from mae_et.data.pixel_format import PixelFormat, channel_axis, format_of, is_tiff, pixel_format
from mae_et.data.tiff import Box, TiffPixels
from mae_et.models.sizes import Size

_LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601, as in Pillow
_EXAMINED = (512, 512)  # px: values of larger images are examined at an overview, where there is one


class Pixels(Protocol):
    """Stored values of an image, read as a whole or in part."""

    height: int
    width: int
    stored: PixelFormat

    def values(self, box: Box, size: Size | None, max_pixels: int) -> np.ndarray:
        """Returns the stored values of a region [h, w, bands]; see `TiffPixels.values`."""
        ...


class _InMemory:
    """Values [H, W, bands] of an image, in memory or mapped from a file."""

    def __init__(self, values: np.ndarray, stored: PixelFormat) -> None:
        self.stored, self._values = stored, values
        self.height, self.width = values.shape[:2]

    def values(self, box: Box, size: Size | None, max_pixels: int) -> np.ndarray:
        top, left, rows, columns = box
        return self._values[top : top + rows, left : left + columns]


class ImageArray:
    """An image as the run wants it: uint8, or float32 with `value_range` as [0, 1].

    Args:
        pixels: the stored values.
        decoding: number of channels, value range and type.
    Raises:
        BadImageError: if the number of bands or the type of the values does not fit.
    """

    def __init__(self, pixels: Pixels, decoding: Decoding) -> None:
        self.height, self.width = pixels.height, pixels.width
        self.share_outside = 0.0  # of the values of the region that was read last, beyond the value range
        self._pixels, self._decoding = pixels, decoding
        stored, num_channels = pixels.stored, decoding.num_channels
        if stored.num_bands != num_channels and not {stored.num_bands, num_channels} <= {1, 3}:
            raise BadImageError(
                f"{stored}, and model.in_chans = {num_channels}; set model.in_chans = {stored.num_bands}, or export "
                f"{num_channels}"
            )
        if stored.number.startswith("complex"):
            raise BadImageError(f"{stored} cannot be read; export real numbers")
        if stored.is_deep and decoding.value_range is None:
            raise BadImageError(f"{stored} have no defined black and white; set data.value_range=(black, white)")

    def read(self, box: Box | None = None, size: Size | None = None) -> np.ndarray:
        """Reads a region.

        Args:
            box: top, left, height and width, px; None: the whole image.
            size: as in `TiffPixels.values`.
        Returns:
            [h, w, C] uint8, or float32 in [0, 1].
        Raises:
            BadImageError: if the region cannot be read, or a value is NaN or infinite.
        """
        stored, (num_channels, value_range, max_pixels, dtype) = self._pixels.stored, self._decoding
        with explained():
            values = self._pixels.values(box or (0, 0, self.height, self.width), size, max_pixels)
        _check_finite(values, stored)
        if dtype == "uint8" and stored.bits == 8 and num_channels == values.shape[2] and not stored.white_is_zero:
            return np.ascontiguousarray(values if values.dtype == np.uint8 else np.rint(values), dtype=np.uint8)
        low, high = (0, 2**stored.bits - 1) if not stored.is_deep else value_range or (0, 1)
        # Double precision, because 32-bit integers do not fit in single precision.
        pixels: np.ndarray = values.astype("float64" if values.itemsize > 2 else "float32")
        pixels -= low
        pixels /= high - low
        self.share_outside = float(np.mean((pixels < 0) | (pixels > 1)))
        pixels = pixels.clip(0, 1, out=pixels)
        if stored.white_is_zero:
            pixels = 1 - pixels
        if values.shape[2] != num_channels:
            grey = pixels @ np.array(_LUMA) if num_channels == 1 else pixels[..., 0]
            pixels = np.repeat(grey[..., None], num_channels, axis=2)
        if dtype == "uint8":
            return (pixels * 255 + 0.5).astype(np.uint8)
        return np.ascontiguousarray(pixels, dtype=np.float32)


def array_image(pixels: np.ndarray, decoding: Decoding) -> ImageArray:
    """Wraps pixels that are scaled to their value range already.

    Args:
        pixels: [H, W, C] uint8 or uint16; black is 0, white the largest number of the type.
        decoding: of the data set.
    """
    bits = 8 * pixels.itemsize
    return ImageArray(
        _InMemory(pixels, PixelFormat(pixels.shape[2], bits)), decoding._replace(value_range=(0, 2**bits - 1))
    )


def decode(file: bytes | str | Path, decoding: Decoding) -> Image.Image | ImageArray:
    """Decodes one image file.

    Args:
        file: the content of the file, or its path. TIFF and .npy files that are named by a path are read in part.
        decoding: how the images of the data set are decoded.
    Returns:
        A picture of mode RGB or L if `decoding.is_picture`, otherwise an array.
    Raises:
        BadImageError: if the file cannot be read, or its values do not fit.
        DataError: if a package is missing that the kind of file needs.
    """
    if not isinstance(file, bytes):
        file = Path(file)
        if decoding.is_picture or file.suffix.lower() not in (".tif", ".tiff", ".npy") or not os.path.isfile(file):
            file = read_file(file)
    kind = _kind(file)
    if decoding.is_picture and kind in (None, "tiff"):
        content = file if isinstance(file, bytes) else read_file(file)
        return decode_image(content, decoding.num_channels, decoding.value_range, decoding.max_pixels)
    image = ImageArray(_open(file, kind, decoding), decoding)
    if not decoding.is_picture:
        return image
    pixels = image.read()
    return Image.fromarray(pixels.squeeze(2) if decoding.num_channels == 1 else pixels)


def examine(content: bytes, decoding: Decoding) -> ImageFacts:
    """Reads the header of an image file, and its values where they are not 8-bit colour.

    Raises:
        BadImageError: if it cannot be read.
        DataError: as `decode`.
    """
    kind = _kind(content)
    if (kind is None and decoding.num_channels in (1, 3)) or (kind == "tiff" and decoding.is_picture):
        return examine_image(content, decoding.max_pixels)
    pixels = _open(content, kind, decoding)
    with explained():
        values = pixels.values((0, 0, pixels.height, pixels.width), _EXAMINED, decoding.max_pixels)
    _check_finite(values, pixels.stored)
    facts = ImageFacts(pixels.width, pixels.height, 1, pixels.stored, needs_range=True)
    if values.dtype.kind == "c":
        return facts
    num_values = number_of_values(values) if pixels.stored.num_bands == 1 else None
    return replace(facts, lowest=float(values.min()), highest=float(values.max()), num_values=num_values)


def array_size(path: Path) -> tuple[int, int]:
    """Returns width and height, px, of a TIFF, .npy or DICOM file of any number of bands.

    Raises: as `decode`.
    """
    kind = _kind(path)
    if kind is None:
        raise BadImageError("neither TIFF, .npy nor DICOM")
    pixels = _open(path, kind, Decoding(0))  # no number of bands: they are on the shortest axis
    return pixels.width, pixels.height


def is_array_file(content: bytes) -> bool:
    """Tells whether a file of this content is .npy or DICOM."""
    return _kind(content) in ("npy", "dicom")


def _check_finite(values: np.ndarray, stored: PixelFormat) -> None:
    if values.dtype.kind in "fc" and (num_faulty := values.size - np.count_nonzero(np.isfinite(values))):
        raise BadImageError(f"NaN or infinity among {stored} ({num_faulty} of {values.size}); replace these values")


def _kind(file: bytes | Path) -> str | None:
    """Returns "npy", "dicom" or "tiff"; None: a file for Pillow."""
    if isinstance(file, bytes):
        start = file[:132]
    else:
        with file.open("rb") as opened_file:
            start = opened_file.read(132)
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if is_dicom(start):
        return "dicom"
    return "tiff" if is_tiff(start) else None


def _open(file: bytes | Path, kind: str | None, decoding: Decoding) -> Pixels:
    num_channels, max_pixels = decoding.num_channels, decoding.max_pixels
    with explained():
        if kind == "npy":
            if isinstance(file, bytes):
                values = np.load(io.BytesIO(file), allow_pickle=False)
            else:
                values = np.load(file, mmap_mode="r", allow_pickle=False)
            return _in_memory(values, format_of(values.dtype, 1), decoding)
        if kind == "dicom":
            return _in_memory(*read_dicom(file, max_pixels), decoding)
        if kind == "tiff":
            pixels = TiffPixels(file, num_channels)
            if pixels.stored.is_deep or num_channels not in (1, 3):
                return pixels
        content = file if isinstance(file, bytes) else read_file(file)
        return _by_pillow(content, decoding)


def _in_memory(values: np.ndarray, stored: PixelFormat, decoding: Decoding) -> Pixels:
    if values.ndim not in (2, 3) or 0 in values.shape or values.dtype.kind not in "buifc":
        raise BadImageError(
            f"an array of shape {values.shape} and type {values.dtype} is no image; write numbers of shape [H, W], [H, W, C] or "
            "[C, H, W]"
        )
    if values.ndim == 2:
        values = values[..., None]
    else:
        values = np.moveaxis(values, channel_axis(values.shape, decoding.num_channels), -1)
    if values.shape[0] * values.shape[1] > decoding.max_pixels and not isinstance(values, np.memmap):
        raise BadImageError(
            f"{values.shape[1]} x {values.shape[0]} px is above the limit of {decoding.max_pixels} pixels; shrink the image or "
            "raise data.max_image_pixels"
        )
    return _InMemory(values, replace(stored, num_bands=values.shape[2]))


def _by_pillow(content: bytes, decoding: Decoding) -> Pixels:
    """Reads what Pillow reads: grey of any depth, 8-bit pictures, and the bands of RGBA, LA and CMYK as channels."""
    num_channels, max_pixels = decoding.num_channels, decoding.max_pixels
    with opened(content, max_pixels) as image:
        stored = pixel_format(image, content)
        if stored.is_deep and stored.num_bands > 1:
            if image.format != "PNG":
                raise BadImageError(f"{image.format} of {stored} is read with 8 bits only; convert it to PNG or TIFF")
            return _InMemory(upright(image, _deep_png(content)), stored)
        image.load()
        if stored.is_deep:
            values = pillow_values(image, stored)
            if stored.scale != 1:
                values = np.rint(values / stored.scale)
        elif num_channels in (1, 3):
            values = np.asarray(decode_image(content, num_channels, None, max_pixels))
        else:
            mode = {"P": "RGB", "1": "L"}.get(image.mode)
            values = np.asarray(image.convert(mode) if mode else image)
        if stored.is_deep or num_channels not in (1, 3):
            values = upright(image, values)
    values = values.reshape(*values.shape[:2], -1)
    return _InMemory(values, PixelFormat(values.shape[2], stored.bits if stored.is_deep else 8, stored.number))


def _deep_png(content: bytes) -> np.ndarray:
    """Decodes a colour PNG of 16 bits, of which Pillow keeps 8."""
    import torch  # here, because the processes that write shards import this module and need no torch
    from torchvision.io import ImageReadMode, decode_png

    pixels = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return pixels.permute(1, 2, 0).numpy()
