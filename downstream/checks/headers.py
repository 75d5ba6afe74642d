"""Sizes of image files from their headers, as the loaders of mmcv will see them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mae_et.data.arrays import array_size
from mae_et.data.decoding import BadImageError
from mae_et.errors import UserError

ORIENTATION = 274  # EXIF tag
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
NUM_THREADS = 8


@dataclass(frozen=True)
class Header:
    """What the header of an image file says.

    Args:
        size: stored (width, height) in px; None if the file cannot be read.
        orientation: of EXIF; 1 is upright.
        fault: why the file cannot be read.
    """

    size: tuple[int, int] | None
    orientation: int = 1
    fault: str = ""

    def loaded_size(self, is_turned: bool) -> tuple[int, int] | None:
        """Returns (width, height) of the loaded image.

        Args:
            is_turned: the loader turns images upright by EXIF, as mmcv does for color_type "color" and "grayscale".
        """
        if self.size is None or not is_turned or self.orientation not in SIDEWAYS:
            return self.size
        return self.size[1], self.size[0]


def read_headers(paths: Sequence[Path]) -> Iterator[Header]:
    """Reads the headers of files in their order, without decoding pixels."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        yield from pool.map(read_header, paths)


def read_header(path: Path) -> Header:
    """Reads the header of one file. A file that is missing or broken gives a `fault`."""
    if not path.is_file():  # a FIFO would block
        return Header(None, fault="no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                # Pillow decodes a whole PNG in search of EXIF data at its end.
                has_exif = image.format != "PNG" or "exif" in image.info
                return Header(image.size, image.getexif().get(ORIENTATION, 1) if has_exif else 1)
    except UnidentifiedImageError as error:
        try:
            return Header(array_size(path))
        except (BadImageError, UserError):
            return Header(None, fault=str(error))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Header(None, fault=str(error).splitlines()[0] if str(error) else type(error).__name__)


def turns_upright(pipeline: Sequence[object]) -> bool:
    """Whether the LoadImageFromFile of a pipeline turns images upright by EXIF."""
    for step in pipeline:
        if isinstance(step, dict) and str(step.get("type")).rpartition(".")[2] == "LoadImageFromFile":
            return step.get("color_type", "color") in ("color", "grayscale")
    return True
