"""TIFF files of any number of bands and number type, of which only the needed strips and tiles are decoded.

A file may be larger than the memory: a region is read from the smallest overview that has enough pixels, and a region above
a limit is averaged while its strips or tiles are read. Shapes: H x W px of the image, h x w of a region, C bands.
"""

from __future__ import annotations

import io
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from mae_et.data.box import scaled_box
from mae_et.data.decoding import BadImageError
from mae_et.data.pixel_format import PixelFormat, channel_axis, format_of
from mae_et.errors import DataError
from mae_et.models.sizes import Size

Box = tuple[int, int, int, int]  # top, left, height and width, px
_SEPARATE, _WHITE_IS_ZERO, _PALETTE, _ORIENTATION = 2, 0, 3, 274


class TiffPixels:
    """The first image of a TIFF file, with its overviews.

    The bands are samples of the pixels (in one plane or in separate ones), or pages of equal size.

    Args:
        file: the content of the file, or its path.
        num_channels: number of bands that the caller needs. It decides which axis holds the bands where the file has no name
            for the axis.
    Raises:
        DataError: if tifffile is not installed.
        BadImageError: if the file has more than three axes, or a palette.
    """

    def __init__(self, file: bytes | Path, num_channels: int) -> None:
        try:
            from tifffile import TiffFile
        except ImportError as error:
            raise DataError(
                "TIFF files of this kind need the package tifffile, which is not installed: pip install 'mae_et[tiff]'"
            ) from error
        self._path = None if isinstance(file, bytes) else file
        tif = TiffFile(io.BytesIO(file) if isinstance(file, bytes) else file)
        weakref.finalize(self, tif.close)
        self._file = tif.filehandle
        series = tif.series[0]
        self._levels = list(series.levels)
        sizes = dict(zip(series.get_axes(squeeze=False), series.get_shape(squeeze=False), strict=True))
        axes = "".join(axis for axis, size in sizes.items() if size > 1 or axis in "YX")
        shape = tuple(sizes[axis] for axis in axes)
        if len(shape) not in (2, 3) or not {"Y", "X"} <= set(axes):
            raise BadImageError(f"TIFF of axes {axes} and shape {shape}: write one image of H x W x bands to each file")
        # An array [H, W, C] that is written without the names of its axes becomes H pages of W x C.
        self._is_transposed = (
            len(shape) == 3 and axes[0] not in "SCYX" and channel_axis(shape, num_channels) == 2 and shape[0] > 1
        )
        band = 2 if self._is_transposed else next((i for i, axis in enumerate(axes) if axis not in "YX"), None)
        self.height, self.width = (size for i, size in enumerate(shape) if i != band)
        first = self._levels[0].keyframe
        number = format_of(np.dtype(first.dtype), 1 if band is None else shape[band])
        self.stored = PixelFormat(
            number.num_bands, first.bitspersample, number.number, white_is_zero=first.photometric == _WHITE_IS_ZERO
        )
        self._is_palette = first.photometric == _PALETTE
        self._orientation = first.tags.valueof(_ORIENTATION, 1)

    def values(self, box: Box, size: Size | None, max_pixels: int) -> np.ndarray:
        """Reads a region.

        Args:
            box: of the region.
            size: (h, w) that the region will be resized to, px; overviews with at least this many pixels are used. None: the
                image itself.
            max_pixels: limit for h * w; a larger region is averaged over squares of pixels.
        Returns:
            [h, w, C] stored values, or their means as float32.
        """
        if self._is_palette or self._orientation != 1:
            what = "a palette" if self._is_palette else f"the orientation {self._orientation}"
            raise BadImageError(f"TIFF with {what}, which is not applied to arrays: convert the file")
        level = self._level(box, size)
        if level:
            height, width = self._level_shape(level)
            box = scaled_box(box, (self.height, self.width), (height, width))
        top, left, rows, columns = box
        factor = math.ceil(math.sqrt(rows * columns / max_pixels))
        if factor <= 1:
            return self._region(level, box)
        height, width = max(1, rows // factor), max(1, columns // factor)
        step = max(1, max_pixels // (columns * factor))
        parts = []
        for start in range(0, height, step):
            num = min(step, height - start)
            part = self._region(level, (top + start * factor, left, num * factor, width * factor))
            parts.append(part.reshape(num, factor, width, factor, -1).mean(axis=(1, 3), dtype=np.float32))
        return np.concatenate(parts)

    def _level(self, box: Box, size: Size | None) -> int:
        """Returns the smallest overview at which a crop has the pixels of a size, or 0."""
        if size is None or self._is_transposed:
            return 0
        for level in range(len(self._levels) - 1, 0, -1):
            height, width = self._level_shape(level)
            if box[2] * height >= size[0] * self.height and box[3] * width >= size[1] * self.width:
                return level
        return 0

    def _level_shape(self, level: int) -> tuple[int, int]:
        page = self._levels[level].keyframe
        return page.imagelength, page.imagewidth

    def _region(self, level: int, box: Box) -> np.ndarray:
        series = self._levels[level]
        pages = list(series.pages)
        num_bands = len(pages) * series.keyframe.samplesperpixel
        whole: np.ndarray
        if self._is_transposed:
            whole = series.asarray().reshape(self.height, self.width, -1)
        elif None not in pages and series.keyframe.imagedepth == 1 and num_bands == self.stored.num_bands:
            return np.concatenate([self._page_region(page, box) for page in pages], axis=-1)
        else:  # ImageJ's files of more than 4 GB have one page
            whole = series.asarray().reshape(-1, *self._level_shape(level))
            whole = np.moveaxis(whole, 0, -1)
        top, left, rows, columns = box
        return whole[top : top + rows, left : left + columns]

    def _page_region(self, page: Any, box: Box) -> np.ndarray:
        """Decodes the strips or tiles of a page that meet a box: [h, w, its bands]."""
        key = page.keyframe
        top, left, rows, columns = box
        height, width = key.imagelength, key.imagewidth
        if key.is_tiled:
            part_height, part_width = key.tilelength, key.tilewidth
        else:
            part_height, part_width = min(key.rowsperstrip, height), width
        num_planes = key.samplesperpixel if key.planarconfig == _SEPARATE else 1
        num_samples = key.samplesperpixel // num_planes
        if self._path is not None and num_planes == 1 and len(page.dataoffsets) == 1 and key.is_memmappable:
            dtype = np.dtype(key.parent.byteorder + key.dtype.char)
            shape = (height, width, num_samples)
            mapped = np.memmap(self._path, dtype, "r", page.dataoffsets[0], shape)
            return np.asarray(mapped[top : top + rows, left : left + columns]).astype(key.dtype)
        down, across = -(-height // part_height), -(-width // part_width)
        out = np.empty((rows, columns, num_planes * num_samples), key.dtype)
        tables = {"jpegtables": page.jpegtables} if page.jpegtables is not None else {}
        for plane in range(num_planes):
            for row in range(top // part_height, (top + rows - 1) // part_height + 1):
                for column in range(left // part_width, (left + columns - 1) // part_width + 1):
                    index = (plane * down + row) * across + column
                    y, x = row * part_height, column * part_width
                    y0, y1 = max(top, y), min(top + rows, y + part_height, height)
                    x0, x1 = max(left, x), min(left + columns, x + part_width, width)
                    self._file.seek(page.dataoffsets[index])
                    content = self._file.read(page.databytecounts[index]) or None  # a sparse file lacks empty tiles
                    part = key.decode(content, index, **tables)[0]
                    pixels = key.nodata if part is None else part[0, y0 - y : y1 - y, x0 - x : x1 - x]
                    out[y0 - top : y1 - top, x0 - left : x1 - left, plane : plane + num_samples] = pixels
        return out
