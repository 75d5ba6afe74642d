"""Decodes the files that Pillow reads to upright 8-bit RGB or grey; a BadImageError says why one cannot be used.

`arrays.decode` reads all other images, and chooses between both.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError, features

from mae_et.data.pixel_format import PixelFormat, pixel_format, tiff_format
from mae_et.errors import UserError

# Only these decoders are tried. Pillow would otherwise try others as well, and give PostScript to Ghostscript.
_EXTENSIONS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png", "apng"),
    "BMP": ("bmp", "dib"),
    "GIF": ("gif",),
    "WEBP": ("webp",),
    "TIFF": ("tif", "tiff"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
}
if features.check("avif"):
    _EXTENSIONS["AVIF"] = ("avif",)
if features.check("jpg_2000"):
    _EXTENSIONS["JPEG2000"] = ("jp2", "j2k", "jpx", "jpf", "j2c", "jpc")
_FORMATS = tuple(_EXTENSIONS)
IMAGE_EXTENSIONS = tuple(extension for extensions in _EXTENSIONS.values() for extension in extensions)
# Read only where there are no files of IMAGE_EXTENSIONS: beside pictures, arrays are features or masks.
ARRAY_EXTENSIONS = ("npy", "dcm", "dicom")

MAX_IMAGE_PIXELS = 1 << 26  # 8192 x 8192: about 1 GiB of memory in the worst case
HIGHEST_MAX_IMAGE_PIXELS = 178_956_970  # Pillow refuses larger images itself

# Pillow refuses a PNG file with a text of more than 1 MiB. All texts together stay limited to 64 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(Exception):
    """An image that cannot be used. The text is the reason, in a few words."""


class Decoding(NamedTuple):
    """How the images of a data set are decoded."""

    num_channels: int = 3
    value_range: tuple[float, float] | None = None  # stored values (black, white) of images that are not 8-bit
    max_pixels: int = MAX_IMAGE_PIXELS
    dtype: Literal["uint8", "float32"] = "uint8"  # of the images; float32 in [0, 1]

    @property
    def is_picture(self) -> bool:
        """Whether a Pillow picture holds the images: RGB or grey with 8 bits."""
        return self.dtype == "uint8" and self.num_channels in (1, 3)

    @property
    def pixel_bytes(self) -> int:
        """Size of a pixel with all its channels, bytes."""
        return self.num_channels * np.dtype(self.dtype).itemsize

    def check(self) -> None:
        """Raises ValueError if a value is out of range."""
        if self.num_channels < 1:
            raise ValueError(
                f"num_channels is {self.num_channels}; set 3 (RGB) or 1 (grey), or the bands of your images"
            )
        if self.value_range is not None:
            low, high = self.value_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(
                    f"value_range is {self.value_range}; set (black, white), two numbers with black < white"
                )
        if not 1 <= self.max_pixels <= HIGHEST_MAX_IMAGE_PIXELS:
            raise ValueError(
                f"max_image_pixels is {self.max_pixels}; set it in 1..{HIGHEST_MAX_IMAGE_PIXELS}, Pillow's own limit"
            )


@dataclass(frozen=True)
class ImageFacts:
    """What the header of a file says, and the values of a single band."""

    width: int  # px, upright
    height: int
    orientation: int  # EXIF, 1 to 8
    stored: PixelFormat
    lowest: float | None = None  # stored values; None where the image has several bands or was not loaded
    highest: float | None = None
    num_values: int | None = None  # different stored values
    needs_range: bool = False  # whether values of more than 8 bits are refused without a value range


def decode_image(
    file: bytes | str | Path,
    num_channels: int = 3,
    value_range: tuple[float, float] | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Image.Image:
    """Decodes one image file to 8 bits per channel.

    The EXIF orientation is applied. Transparency is composited over white. Of an animation the first frame is taken.
    Grey and RGB are converted to each other. Grey values of more than 8 bits are scaled linearly: 0 becomes black, and
    the highest value of the file's number type white (65535 for 16 bits, 4095 for 12 bits, 32767 for signed 16 bits).
    The content of an image never decides its scale.

    Args:
        file: the content of the file, or its path.
        num_channels: 3 for mode RGB, 1 for mode L.
        value_range: stored values (black, white) of grey images that are not 8-bit; values outside are clipped. None:
            by the number type. 8-bit images always have (0, 255).
        max_pixels: larger images are refused.
    Returns:
        A loaded image of mode RGB or L.
    Raises:
        BadImageError: if the file is missing, empty, not a regular file, cut off, not an image, too large, or has bands
            or number types that cannot be read.
        ValueError: if another argument is out of range.
    """
    Decoding(num_channels, value_range, max_pixels).check()
    if num_channels not in (1, 3):
        raise ValueError(f"num_channels is {num_channels}; a picture has 3 (RGB) or 1 (grey): use `arrays.decode`")
    content = file if isinstance(file, bytes) else read_file(file)
    with opened(content, max_pixels) as image:
        stored = pixel_format(image, content)
        image.load()
        method = _UPRIGHT.get(orientation(image))
        flat = _flatten(image, stored, "RGB" if num_channels == 3 else "L", value_range)
    return flat if method is None else flat.transpose(method)


def examine_image(content: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> ImageFacts:
    """Reads the header of an image file, and the pixels where the image has a single band.

    Raises:
        BadImageError: as `decode_image`, for what the header shows.
    """
    with opened(content, max_pixels) as image:
        stored = pixel_format(image, content)
        turn = orientation(image)
        width, height = image.size if turn < 5 else image.size[::-1]
        facts = ImageFacts(width, height, turn if turn in _UPRIGHT else 1, stored)
        if len(image.getbands()) == 1 and image.format != "JPEG":
            image.load()
            values = pillow_values(image, stored)
            if not np.isfinite(values).all():
                raise BadImageError(f"NaN or infinity among {stored}; replace these values")
            if stored.scale != 1:
                values = np.rint(values / stored.scale)
            facts = replace(
                facts, lowest=float(values.min()), highest=float(values.max()), num_values=number_of_values(values)
            )
    return facts


def number_of_values(values: np.ndarray) -> int:
    """Returns how many different values an array [H, ...] has, in a sample of the rows of a large one."""
    return len(np.unique(values[:: 1 + values.size // 1_000_000]))  # sorting all values takes seconds


@contextlib.contextmanager
def opened(content: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Opens an image without loading it. Exceptions of the block are those of `explained`."""
    if not content:
        raise BadImageError("empty file (0 bytes)")
    with explained():
        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise BadImageError(
                        f"{image.width} x {image.height} px is above the limit of {max_pixels} pixels; shrink the image "
                        "or raise data.max_image_pixels"
                    )
                yield image
        except UnidentifiedImageError as error:
            if (stored := tiff_format(content)) is not None:
                raise BadImageError(
                    f"TIFF of {stored} cannot be read as a picture; set model.in_chans to the number "
                    "of bands, and data.value_range where values are not 8-bit"
                ) from error
            kinds = ", ".join(_FORMATS)
            raise BadImageError(f"not a readable image of the kinds {kinds}; it begins with {content[:8]!r}") from error


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns every exception of a decoder into a BadImageError, except UserErrors; ignores warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (BadImageError, UserError):
            raise
        except MemoryError as error:
            raise BadImageError("not enough memory to decode it") from error
        except (
            Exception
        ) as error:  # decoders raise any exception on a broken file (SyntaxError, struct.error, KeyError)
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadImageError(first_line[:200]) from error


def read_file(path: str | Path) -> bytes:
    """Returns the content of a regular file; raises BadImageError if it cannot be read."""
    try:
        # A FIFO would block in open(), and in read(), until someone writes.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise BadImageError("not a regular file (a FIFO, device or folder)")
            return file.read()
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror or error}") from error


def file_size(path: str | Path) -> int | None:
    """Returns the size of a file in bytes; None if it cannot be read."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of an opened image, 1 (upright) to 8; 1 where there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def upright(image: Image.Image, values: np.ndarray) -> np.ndarray:
    """Turns the values [H, W, ...] of an opened image by its EXIF orientation."""
    turn = orientation(image)
    if turn in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        values = values[:, ::-1]
    if turn in (3, 4, 7, 8):
        values = values[::-1]
    return values


def _flatten(
    image: Image.Image, stored: PixelFormat, mode: str, value_range: tuple[float, float] | None
) -> Image.Image:
    """Converts a loaded image of any Pillow mode to `mode` (RGB or L), without transparency."""
    if stored.fourth_band_undeclared:
        raise BadImageError(
            "RGB TIFF with a fourth band and no ExtraSamples tag: it may be alpha or near infrared. Write that tag (0: not "
            "read, 2: alpha), or export three bands"
        )
    if image.mode in ("F", "I") or image.mode.startswith("I;16") or (stored.is_deep and stored.num_bands == 1):
        image = _grey_to_8_bits(image, stored, value_range)
    elif stored.is_deep and value_range is not None:
        raise BadImageError(
            f"data.value_range cannot be applied to {stored}: colour is read by its highest 8 bits. Convert the file to 8 bits"
        )
    elif _has_transparency(image):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    elif image.mode not in ("RGB", "L", "1"):
        image = image.convert("RGB")
    image = image.convert(mode)
    image.info = {}  # metadata can outweigh the pixels, and a left-over "transparency" misleads later conversions
    return image


def _has_transparency(image: Image.Image) -> bool:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def pillow_values(image: Image.Image, stored: PixelFormat) -> np.ndarray:
    """Returns the values [H, W] of a loaded image of one band: the stored values times `stored.scale`."""
    values = np.asarray(image)
    # Pillow has no mode for these number types and gives their bytes under another one.
    if stored.number == "unsigned integer" and stored.bits == 32:
        return values.view(np.uint32)
    if stored.number == "signed integer" and stored.bits == 8:
        return values.view(np.int8)
    return values


def _grey_to_8_bits(image: Image.Image, stored: PixelFormat, value_range: tuple[float, float] | None) -> Image.Image:
    values = pillow_values(image, stored)
    if value_range is not None:
        low, high = value_range
    elif stored.white is None:
        raise BadImageError(
            f"{stored} have no defined white; set data.value_range=(black, white), or convert to 8 bits"
        )
    else:
        low, high = 0, stored.white
        if (lowest := values.min()) < 0:
            raise BadImageError(f"negative value {lowest} among {stored}; set data.value_range=(black, white)")
    if not np.isfinite(values).all():
        raise BadImageError(f"NaN or infinity among {stored}; replace these values")
    # Single precision holds 16-bit values exactly, and no multiple of 255/65535 lies near the middle of two levels.
    grey: np.ndarray = values.astype("float32" if stored.bits <= 16 else "float64")
    grey -= low * stored.scale
    grey *= 255 / ((high - low) * stored.scale)
    levels = (grey.clip(0, 255, out=grey) + 0.5).astype(np.uint8)
    if stored.white_is_zero:
        levels = 255 - levels
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        levels[values == transparent] = 255
    return Image.fromarray(levels)
