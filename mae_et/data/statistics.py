"""Statistics of a data set: mean and deviation of pixels, sizes, classes, unreadable images.

Mean and deviation are per channel, in [0, 1] (of the value range, if one is given), over all pixels of the images that are
read. Each image is first resized and centre-cropped to 224 x 224 (shorter side to 256, bicubic), so images of all sizes
count the same. The deviation divides by the number of pixels. Sizes are those of the upright image before resizing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mae_et.data.arrays import ImageArray
from mae_et.data.decoding import BadImageError
from mae_et.data.sources.source import ImageSource
from mae_et.data.transforms import EvalTransform
from mae_et.errors import DataError

SIZE = 224


class Look(NamedTuple):
    """The part of one image: sums over its pixels, per channel; or the reason why it cannot be read.

    Pixels are integers in 0..255, or numbers in [0, 1] where the source has float32 images.
    """

    number: int
    sums: list[float]
    squares: list[float]
    width: int
    height: int
    share_outside: float  # of the values, beyond the value range
    reason: str | None


class Looks(Dataset[Look]):
    """The images at the given indices of a source."""

    def __init__(self, source: ImageSource, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.transform = EvalTransform(SIZE)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Look:
        index = int(self.indices[position])
        try:
            image = self.source.load(index)
            pixels = self.transform(image).flatten(1)
        except BadImageError as error:
            return Look(index, [], [], 0, 0, 0.0, str(error))
        pixels = pixels.double() if pixels.is_floating_point() else pixels.long()
        outside = image.share_outside if isinstance(image, ImageArray) else 0.0
        sums, squares = pixels.sum(1).tolist(), (pixels**2).sum(1).tolist()
        return Look(index, sums, squares, image.width, image.height, outside, None)


def collect(source: ImageSource, max_images: int | None = None, num_workers: int = 0) -> dict[str, Any]:
    """Reads all images, or `max_images` evenly spread ones, and returns their statistics, ready for JSON.

    Raises:
        DataError: if no image can be read.
    """
    num_tried = len(source) if max_images is None else min(max_images, len(source))
    indices = np.linspace(0, len(source) - 1, num_tried).round().astype(np.int64)
    loader = DataLoader(Looks(source, indices), batch_size=None, num_workers=num_workers)
    sums: list[float] = []
    squares: list[float] = []
    shares: list[float] = []
    sizes: list[tuple[int, int]] = []
    bad: list[dict[str, str]] = []
    for look in tqdm(loader, total=num_tried, unit="image"):
        if look.reason is not None:
            bad.append({"name": source.name(look.number), "reason": look.reason})
            continue
        # Python's integers for 8-bit images: exact, however many images there are.
        sums = [a + b for a, b in zip(sums or [0] * len(look.sums), look.sums, strict=True)]
        squares = [a + b for a, b in zip(squares or [0] * len(look.squares), look.squares, strict=True)]
        sizes.append((look.width, look.height))
        shares.append(look.share_outside)
    if not sizes:
        raise DataError(f"none of {num_tried} images can be read; the first is {bad[0]['name']}: {bad[0]['reason']}")
    num_pixels = len(sizes) * SIZE * SIZE
    white = 255 if source.decoding.dtype == "uint8" else 1
    mean = [total / num_pixels / white for total in sums]
    # n * sum(x^2) - sum(x)^2 in integers: no cancellation.
    std = [max(0, num_pixels * b - a * a) ** 0.5 / num_pixels / white for a, b in zip(sums, squares, strict=True)]
    widths, heights = zip(*sizes, strict=True)
    return {
        "num_images": len(source),
        "num_read": len(sizes),
        "mean": mean,
        "std": std,
        "width": _spread(widths),
        "height": _spread(heights),
        "shorter_side": _spread([min(size) for size in sizes]),
        "classes": _classes(source),
        "num_clipped": sum(share > 0 for share in shares),
        "share_clipped": sum(shares) / len(shares),
        "num_bad": len(bad),
        "bad": bad,
    }


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"min": int(min(values)), "median": float(np.median(values)), "max": int(max(values))}


def _classes(source: ImageSource) -> dict[str, int] | None:
    """Returns the number of images of each class (its name, or its index), over the whole source."""
    if source.labels is None:
        return None
    names = source.class_names
    counts = np.bincount(np.asarray(source.labels), minlength=len(names or ()))
    return {names[i] if names else str(i): int(count) for i, count in enumerate(counts)}
