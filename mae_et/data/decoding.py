"""Any image file -> 8-bit RGB or grey, upright; or a BadImageError that says why not."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm")

# Only these decoders are tried: Pillow would otherwise guess further, down to handing a file to Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
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
    """An image that cannot be used; its text is the reason, in a few words."""


def decode_image(file: bytes | str | Path, num_channels: int = 3) -> Image.Image:
    """Decodes one image file to 8 bits a channel.

    The EXIF orientation is applied; 16-bit grey is scaled (65535 becomes 255), not clipped; transparency is composited
    over white; of an animation the first frame is taken. Grey and RGB are converted to each other as asked.

    Args:
        file: the file's content, or its path.
        num_channels: 3 for mode RGB, 1 for mode L.
    Returns:
        A loaded image of mode RGB or L.
    Raises:
        BadImageError: for a file that is missing, empty, cut off, no image, larger than Pillow allows (twice
            `PIL.Image.MAX_IMAGE_PIXELS`), or that holds values without a defined range (floats, integers above 65535).
        ValueError: if num_channels is neither 1 nor 3.
    """
    if num_channels not in (1, 3):
        raise ValueError(f"num_channels is {num_channels}: an image is read as 3 (RGB) or 1 (grey); set one of these")
    mode = "RGB" if num_channels == 3 else "L"
    content = file if isinstance(file, bytes) else read_file(file)
    if not content:
        raise BadImageError("empty file (0 bytes)")
    # Pillow's decoders raise whatever a broken file leads them to (SyntaxError, struct.error, KeyError, ...).
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
                opened.load()
                method = _UPRIGHT.get(orientation(opened))
                image = _flatten(opened, mode)
        except BadImageError:
            raise
        except UnidentifiedImageError as error:
            kinds = ", ".join(_FORMATS)
            raise BadImageError(f"not a readable image of the kinds {kinds}; it begins with {content[:8]!r}") from error
        except Exception as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadImageError(first_line[:200]) from error
    return image if method is None else image.transpose(method)


def read_file(path: str | Path) -> bytes:
    """Returns a file's content; raises BadImageError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror or error}") from error


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of an opened image, 1 (upright) to 8; 1 where there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """A loaded image of any Pillow mode -> `mode` (RGB or L), without transparency."""
    if image.mode == "F":
        raise BadImageError("float pixels have no defined range; convert to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _grey_to_8_bits(image)
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


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    highest = int(values.max())
    if highest > 65535 or int(values.min()) < 0:
        raise BadImageError("32-bit grey outside 0..65535 has no defined range; convert to 8 or 16 bits")
    if image.mode == "I" and highest <= 255:
        grey = values.astype(np.uint8)
    else:
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)
