"""Generated scenes as an image source."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mae_et.data.decoding import Decoding
from mae_et.data.sources.listing import LeftOut
from mae_et.errors import DataError, printable

_SCENES_GRAMMAR = "scenes:NUM[@SIZE][,seed=S][,first=I], e.g. scenes:2000@96,seed=1"


class SceneSource:
    """Generated scenes, kept in memory after the first use: up to 1 GiB in each process, otherwise made each time.

    Args:
        num_images: number of scenes, at least 1.
        image_size: px, (H, W) or the side of a square.
        seed: another seed gives another set of scenes.
        num_channels: 3 (RGB) or 1 (grey).
        first: number of the first scene. Sets of one seed that do not overlap have no scene in common.
    Raises:
        DataError: if the number or the size is out of range.
    """

    def __init__(
        self, num_images: int, image_size: int | tuple[int, int], seed: int = 0, num_channels: int = 3, first: int = 0
    ) -> None:
        from mae_et.data.scenes.painter import MIN_SIDE  # here and below: readers of files need no painter

        if num_images < 1:
            raise DataError(f"the number of scenes is {num_images}; set it to at least 1: {_SCENES_GRAMMAR}")
        self.num_images, self.seed, self.first = num_images, seed, first
        self.decoding, self.left_out = Decoding(num_channels), LeftOut()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < MIN_SIDE:
            raise DataError(f"the scenes' size is {height} x {width} px; set both sides to at least {MIN_SIDE} px")
        self.image_size = (height, width)
        self._labels: array[int] | None = None
        self._forget()

    def _forget(self) -> None:
        shape = (self.num_images, *self.image_size, 3)
        fits = int(np.prod(shape, dtype=np.int64)) <= 1 << 30
        self._pixels = np.zeros(shape, np.uint8) if fits else None  # the system allocates its pages on first use
        self._made = np.zeros(self.num_images, bool)

    @property
    def labels(self) -> Sequence[int]:
        from mae_et.data.scenes.painter import scene_label

        if self._labels is None:
            numbers = range(self.first, self.first + self.num_images)
            self._labels = array("q", (scene_label(number, self.seed) for number in numbers))
        return self._labels

    @property
    def class_names(self) -> Sequence[str]:
        from mae_et.data.scenes.painter import SCENE_CLASSES

        return list(SCENE_CLASSES)

    def __len__(self) -> int:
        return self.num_images

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_pixels", "_made")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def name(self, index: int) -> str:
        return f"scene {self.first + index} of seed {self.seed}"

    def key(self, index: int) -> str:
        return self.name(index)

    def size(self, index: int) -> None:
        return None

    def read(self, index: int) -> None:
        return None

    def load(self, index: int) -> Image.Image:
        if not 0 <= index < self.num_images:
            raise IndexError(f"scene {index} of {self.num_images}")
        if self._pixels is not None and self._made[index]:
            pixels = self._pixels[index].copy()
        else:
            pixels = self._make(index)
        image = Image.fromarray(pixels)
        return image if self.decoding.num_channels == 3 else image.convert("L")

    def _make(self, index: int) -> np.ndarray:
        from mae_et.data.scenes.painter import make_scene

        pixels = make_scene(self.first + index, image_size=self.image_size, seed=self.seed).image
        if self._pixels is not None:
            self._pixels[index] = pixels
            self._made[index] = True
        return pixels


def parse_scenes(spec: str, num_channels: int) -> SceneSource:
    """Opens what `scenes:NUM[@SIZE][,seed=S][,first=I]` names; raises DataError for another grammar."""
    match = re.fullmatch(r"scenes:(\d+)(?:@(\d+)(?:x(\d+))?)?((?:,(?:seed|first)=\d+)*)", spec)
    if match is None:
        raise DataError(f"{printable(spec)} cannot be read; a generated set is written {_SCENES_GRAMMAR}")
    height = int(match[2] or 96)
    options = {key: int(value) for key, value in re.findall(r",(\w+)=(\d+)", match[4])}
    return SceneSource(int(match[1]), (height, int(match[3] or height)), num_channels=num_channels, **options)
