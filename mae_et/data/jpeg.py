"""Decoding of ordinary JPEG files only as far as a crop needs, to the pixels that Pillow gives.

Reading a JPEG's bits is two thirds of decoding it, and they can only be read from the top. What lies below the crop need not
be read: with a smaller height written into its header, the file is that of the upper part of the picture.
Whatever is not plainly an ordinary file (baseline or progressive, 8-bit YCbCr, upright, whole, no larger than Pillow
takes without a warning) is left to `decode_image`, which also says what is wrong with a broken one.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from mae_et.data.decoding import orientation
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
    """What must be known before decoding."""

    height: int  # px
    width: int
    height_at: int  # byte where the height is written
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


def read_header(content: bytes) -> JpegHeader | None:
    """Returns the header of an ordinary JPEG file, or None for any other content, broken files among them."""
    if not (content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9")):
        return None
    try:
        header, has_metadata = _parse(content)
        if header is None or header.height * header.width > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        if has_metadata:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(content), formats=("JPEG",)) as opened:
                    return header if orientation(opened) == 1 else None
    except Exception:  # as Pillow's reader of metadata, which raises anything; decode_image tells what is wrong
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
    """Decodes a part of the picture.

    Args:
        content: of an ordinary JPEG file.
        header: its, from `read_header`.
        box: top, left, height and width in px, inside the picture.
    Returns:
        [height, width, 3] uint8 RGB, the same as Pillow's; None if the file is not in order. Damage in the middle of a
        file goes unseen where it lies below the crop.
    """
    top, left, height, width = box
    # One group of rows more than the crop needs: its chroma is interpolated with the next one's.
    needed = (-(-(top + height) // header.mcu_height) + 1) * header.mcu_height
    cut = header.can_cut and needed < header.height
    if cut:
        changed = bytearray(content)
        changed[header.height_at : header.height_at + 2] = needed.to_bytes(2, "big")
        content = bytes(changed)
    try:
        # The rows that are left out count as a fault of the file, so that one is not looked for when they are.
        pixels = simplejpeg.decode_jpeg(content, strict=not cut)
    except ValueError:
        return None
    return pixels[top : top + height, left : left + width]
