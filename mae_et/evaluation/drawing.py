"""Draws images of any number of channels and any depth as 8-bit RGB or grey pictures.

Shapes: n images, C channels of which c = 1 or 3 are drawn, H x W px.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_et.data.arrays import ImageArray
from mae_et.errors import UserError


def drawn_channels(num_channels: int) -> tuple[int, ...]:
    """Returns the channels that are drawn unless others are chosen: the first three, or the first of one or two."""
    return (0, 1, 2) if num_channels >= 3 else (0,)


def drawing_note(num_channels: int, is_float: bool, channels: Sequence[int] | None = None) -> str:
    """Says which channels are drawn with which contrast; empty for plain 8-bit RGB or grey. Arguments as for `Drawing`."""
    lines = []
    if channels or num_channels not in (1, 3):
        drawn = ", ".join(map(str, channels or drawn_channels(num_channels)))
        lines.append(f"Channels {drawn} of {num_channels}, counted from 0.")
    if is_float:
        lines.append("Black is mean - 2 std of the data, white mean + 2 std.")
    return " ".join(lines)


class Drawing:
    """How the images of a model are drawn. Images with 8 bits keep their values.

    Float images may fill a small part of their range, so mean - 2 std of the data is drawn black and mean + 2 std white.

    Args:
        mean, std: C values, of pixels in [0, 1].
        is_float: whether the images are float32 in [0, 1], not uint8.
        channels: one or three to draw, counted from 0; None: see `drawn_channels`.
    Raises:
        UserError: if there are no such channels.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], is_float: bool, channels: Sequence[int] | None = None
    ) -> None:
        num_channels = len(mean)
        if channels is not None and (len(channels) not in (1, 3) or not set(channels) <= set(range(num_channels))):
            raise UserError(f"channels {list(channels)} must be one or three numbers from 0 to {num_channels - 1}")
        self.num_channels, self.is_float = num_channels, is_float
        self.channels = list(channels or drawn_channels(num_channels))
        self._given = channels
        self.black, self.contrast = torch.zeros(num_channels, 1, 1), torch.ones(num_channels, 1, 1)
        if is_float:
            means, deviations = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
            self.black, self.contrast = means - 2 * deviations, 4 * deviations

    def __call__(self, pixels: Tensor) -> Tensor:
        """Maps [..., C, H, W], uint8 or fractions of white, to [..., c, H, W] in [0, 1]."""
        fractions = pixels.float() if pixels.is_floating_point() else pixels.float() / 255
        return ((fractions - self.black) / self.contrast).clamp(0, 1)[..., self.channels, :, :]

    def image(self, image: Image.Image | ImageArray, longest: int | None = None) -> Image.Image:
        """Draws an image of a source.

        Args:
            image: as loaded.
            longest: px; the longer side of an array is read with as few pixels as its file offers above this; None: all.
        Returns:
            Mode RGB or L, of the size that was read.
        Raises:
            BadImageError: if an array cannot be read.
        """
        if isinstance(image, ImageArray):
            scale = 1.0 if longest is None else min(1.0, longest / max(image.height, image.width))
            size = (max(1, round(image.height * scale)), max(1, round(image.width * scale)))
            values = image.read(None, None if longest is None else size)
        elif self._given is None:
            return image
        else:
            values = np.array(image)
            values = values[..., None] if values.ndim == 2 else values
        picture = self(torch.from_numpy(values).permute(2, 0, 1)).mul(255).round().to(torch.uint8)
        return Image.fromarray(picture.permute(1, 2, 0).squeeze(2).numpy())

    @property
    def note(self) -> str:
        """See `drawing_note`."""
        return drawing_note(self.num_channels, self.is_float, self._given)
