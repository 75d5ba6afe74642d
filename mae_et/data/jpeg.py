"""Decodes ordinary JPEG files only as far as a crop needs, to the pixels that Pillow gives.

Reading the bits of a JPEG file is two thirds of decoding it, and they can only be read from the top. What lies below the crop
is not read: a smaller height is written into the header, and the file becomes that of the upper part of the picture.
Ordinary files are baseline or progressive, 8-bit YCbCr, upright and complete. All others are left to `decode_image`, which also
gives the reason why a broken file cannot be read.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from mae_et.data.decoding import MAX_IMAGE_PIXELS, orientation
from mae_et.errors import UserError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# The second byte of markers.
_PROGRESSIVE, _SCAN, _APP1, _APP14 = 0xC2, 0xDA, 0xE1, 0xEE
_ORDINARY = (0xC0, 0xC1, _PROGRESSIVE)
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True)
class JpegHeader:
    """The parts of a header that decoding needs."""

    height: int  # px
    width: int
    height_at: int  # byte position of the height
    mcu_height: int  # px: rows are coded in groups of 8 or 16
    is_progressive: bool
    can_cut: bool = False  # whether one scan goes from top to bottom


def check_available() -> None:
    """Raises UserError if the library that decodes is not installed."""
    if simplejpeg is None:
        raise UserError(
            'data.loading = "fast" and "direct" need the package simplejpeg, which is not installed: '
            'pip install simplejpeg, or set data.loading = "exact"'
        )


def read_header(content: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> JpegHeader | None:
    """Returns the header of an ordinary JPEG file of at most `max_pixels`, or None for any other or broken content."""
    if not (content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9")):
        return None
    try:
        header, has_metadata = _parse(content)
        if header is None or header.height * header.width > max_pixels:
            return None
        if has_metadata:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(content), formats=("JPEG",)) as opened:
                    return header if orientation(opened) == 1 else None
    except Exception:  # Pillow's reader of metadata raises any exception; decode_image gives the reason
        return None
    return header


def _parse(content: bytes) -> tuple[JpegHeader | None, bool]:
    """Reads the markers up to the first scan; returns the header and whether there is EXIF or XMP."""
    header, has_metadata = None, False
    position = 2
    while content[position] == 0xFF:
        while content[position + 1] == 0xFF:  # fill bytes
            position += 1
        marker, length, start = content[position + 1], _two_bytes(content, position + 2), position + 4
        if marker == _APP1:
            has_metadata = True
        elif marker == _APP14 and content[start : start + 5] == b"Adobe" and content[start + 11] != 1:
            return None, False  # RGB, CMYK or YCCK
        elif marker in _FRAMES:
            components = content[start + 6 : start + 15]  # identifier, sampling factors, table; three times
            ordinary = marker in _ORDINARY and content[start] == 8 and content[start + 5] == 3
            if header or not ordinary or components[0::3] == b"RGB":
                return None, False
            header = JpegHeader(
                height=_two_bytes(content, start + 1),
                width=_two_bytes(content, start + 3),
                height_at=start + 1,
                mcu_height=8 * max(sampling & 15 for sampling in components[1::3]),
                is_progressive=marker == _PROGRESSIVE,
            )
        elif marker == _SCAN:
            if header is None or not header.height or not header.width:
                return None, False
            one_scan = content[start] == 3 and not header.is_progressive
            return replace(header, can_cut=one_scan), has_metadata
        position = start - 2 + length
    return None, False


def _two_bytes(content: bytes, position: int) -> int:
    return int.from_bytes(content[position : position + 2], "big")


def decode_box(content: bytes, header: JpegHeader, box: tuple[int, int, int, int]) -> np.ndarray | None:
    """Decodes a part of a picture.

    Args:
        content: of an ordinary JPEG file.
        header: its header, from `read_header`.
        box: top, left, height and width in px, inside the picture.
    Returns:
        [height, width, 3] uint8 RGB, the same as Pillow's; None if the file is damaged. Damage below the crop is not
        noticed.
    """
    top, left, height, width = box
    # One more group of rows than the crop needs, because chroma is interpolated with that of the next group.
    needed = (-(-(top + height) // header.mcu_height) + 1) * header.mcu_height
    cut = header.can_cut and needed < header.height
    if cut:
        changed = bytearray(content)
        changed[header.height_at : header.height_at + 2] = needed.to_bytes(2, "big")
        content = bytes(changed)
    try:
        # The missing rows of a cut file count as a fault, so faults can only be looked for in whole files.
        pixels = simplejpeg.decode_jpeg(content, strict=not cut)
    except ValueError:
        return None
    return pixels[top : top + height, left : left + width]
