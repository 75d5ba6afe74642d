"""Describes how a file stores its pixel values: bands, bits and number type, from the header alone."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

Number = Literal["unsigned integer", "signed integer", "float", "complex integer", "complex float"]

_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS, _PHOTOMETRIC, _BANDS, _EXTRA, _NUMBER = 258, 262, 277, 338, 339
_TIFF_NUMBERS: dict[int, Number] = {
    2: "signed integer",
    3: "float",
    5: "complex integer",
    6: "complex float",
}
_WHITE_IS_ZERO, _RGB = 0, 2


@dataclass(frozen=True)
class PixelFormat:
    """The stored values of one image."""

    num_bands: int
    bits: int  # per band
    number: Number = "unsigned integer"
    scale: float = 1.0  # Pillow's value of a stored 1: some readers scale 9 to 15 bits up to 16
    white_is_zero: bool = False
    fourth_band_undeclared: bool = False  # RGB with a fourth band that no tag explains
    num_dropped_bands: int = 0  # bands beyond colour that Pillow does not read

    def __str__(self) -> str:
        bands = "1 band" if self.num_bands == 1 else f"{self.num_bands} bands"
        return f"{bands} of {self.bits}-bit {self.number} values"

    @property
    def white(self) -> float | None:
        """The stored value of white by the number type; None if the type has no usable limit."""
        if self.scale != 1:
            return 65535 / self.scale
        if self.number == "unsigned integer" and self.bits <= 16:
            return 2**self.bits - 1
        if self.number == "signed integer" and self.bits <= 16:
            return 2 ** (self.bits - 1) - 1
        return None

    @property
    def is_deep(self) -> bool:
        """Whether the values are not unsigned integers of at most 8 bits."""
        return self.bits > 8 or self.number != "unsigned integer"


def pixel_format(image: Image.Image, content: bytes) -> PixelFormat:
    """Returns the stored format of an image that is opened but not yet loaded."""
    if image.format == "TIFF":
        return _from_tags(image.tag_v2)  # type: ignore[attr-defined]
    if image.format == "PNG":
        bits, colour_type = content[24], content[25]
        return PixelFormat({0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type], bits)
    if image.format == "PPM" and image.mode == "I":
        arguments = image.tile[0].args  # type: ignore[attr-defined]  # the raw decoder, without a maximum, is used for 65535 only
        maximum = arguments[1] if isinstance(arguments, tuple) else 65535
        assert isinstance(maximum, int)
        return PixelFormat(1, maximum.bit_length(), scale=65535 / maximum)
    if image.format == "JPEG2000" and image.mode.startswith("I;16"):
        bits = (content[content.index(b"\xff\x4f\xff\x51") + 42] & 127) + 1
        return PixelFormat(1, bits, scale=2 ** (16 - bits))
    if image.mode == "F":
        return PixelFormat(1, 32, "float")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return PixelFormat(1, 16)
    return PixelFormat(len(image.getbands()), 1 if image.mode == "1" else 8)


def is_tiff(content: bytes) -> bool:
    """Tells whether a file of this content is TIFF or BigTIFF."""
    return content.startswith(_TIFF_STARTS)


def tiff_format(content: bytes) -> PixelFormat | None:
    """Returns the stored format of a TIFF file that Pillow cannot open; None if it is no TIFF or is damaged."""
    if not is_tiff(content):
        return None
    try:
        stream = io.BytesIO(content)
        tags = ImageFileDirectory_v2(stream.read(16 if content[2:3] == b"+" or content[3:4] == b"+" else 8))
        stream.seek(tags.next)
        tags.load(stream)
        return _from_tags(tags)
    except Exception:  # damaged tags lead Pillow to any exception; the caller has its own message
        return None


def _from_tags(tags: Any) -> PixelFormat:
    bits, num_bands = _first(tags, _BITS, 1), int(_first(tags, _BANDS, 1))
    extra = tags.get(_EXTRA, ())
    extra = extra if isinstance(extra, tuple) else (extra,)
    photometric = _first(tags, _PHOTOMETRIC, 1)
    return PixelFormat(
        num_bands,
        int(bits),
        _TIFF_NUMBERS.get(_first(tags, _NUMBER, 1), "unsigned integer"),
        white_is_zero=photometric == _WHITE_IS_ZERO,
        fourth_band_undeclared=photometric == _RGB and num_bands == 4 and not extra,
        num_dropped_bands=sum(kind == 0 for kind in extra),
    )


def _first(tags: Any, tag: int, default: int) -> int:
    value = tags.get(tag, default)
    return value[0] if isinstance(value, tuple) else value


_NUMPY_NUMBERS: dict[str, Number] = {
    "u": "unsigned integer",
    "i": "signed integer",
    "f": "float",
    "c": "complex float",
}


def format_of(dtype: np.dtype[Any], num_bands: int, bits: int | None = None) -> PixelFormat:
    """Returns the format of an array's values; `bits` are those in use, if fewer than the type has. bool is 1 bit."""
    bits = bits or (1 if dtype.kind == "b" else 8 * dtype.itemsize)
    return PixelFormat(num_bands, bits, _NUMPY_NUMBERS.get(dtype.kind, "unsigned integer"))


def channel_axis(shape: tuple[int, ...], num_channels: int) -> int:
    """Returns which axis of an array [H, W, C] or [C, H, W] holds the channels.

    It is the last or the first axis, in this order, that has `num_channels`, or 1 or 3 where those are converted to each
    other. An array with neither has its channels on the shorter of the two axes.
    """
    for wanted in (num_channels, *((1, 3) if num_channels in (1, 3) else ())):
        for axis in (2, 0):
            if shape[axis] == wanted:
                return axis
    return 0 if shape[0] < shape[2] else 2
