"""Inspects a data set before training: mean and deviation of pixels, sizes, classes, unreadable images, and likely mistakes.

    python tools/dataset_stats.py DATA [--val DATA] [--image-size PX] [--max-images N] [--num-workers W] [--json]

Mean and deviation are per channel, in [0, 1], over all pixels of the images that are read. Each image is first resized and
centre-cropped to 224 x 224 (shorter side to 256, bicubic), so images of all sizes count the same. The deviation divides by the
number of pixels. Sizes are those of the upright image before resizing. The findings are those of mae_et/data/inspection.py,
which training logs as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import _checkout  # noqa: F401
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mae_et.cli import run_tool
from mae_et.data.decoding import MAX_IMAGE_PIXELS, BadImageError
from mae_et.data.inspection import inspect_images
from mae_et.data.sources.source import ImageSource
from mae_et.data.sources.spec import open_source
from mae_et.data.transforms import EvalTransform
from mae_et.errors import DataError, UserError

SIZE = 224
NUM_BAD_SHOWN = 10
NUM_CLASSES_SHOWN = 20


class Look(NamedTuple):
    """The part of one image: sums over its pixels in 0..255, per channel; or the reason why it cannot be read."""

    number: int
    sums: list[int]
    squares: list[int]
    width: int
    height: int
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
        except BadImageError as error:
            return Look(index, [], [], 0, 0, str(error))
        pixels = self.transform(image).flatten(1).long()
        return Look(index, pixels.sum(1).tolist(), (pixels**2).sum(1).tolist(), image.width, image.height, None)


def collect(source: ImageSource, max_images: int | None = None, num_workers: int = 0) -> dict[str, Any]:
    """Reads all images, or `max_images` evenly spread ones, and returns their statistics, ready for JSON.

    Raises:
        DataError: if no image can be read.
    """
    num_read = len(source) if max_images is None else min(max_images, len(source))
    indices = np.linspace(0, len(source) - 1, num_read).round().astype(np.int64)
    loader = DataLoader(Looks(source, indices), batch_size=None, num_workers=num_workers)
    sums: list[int] = []
    squares: list[int] = []
    sizes: list[tuple[int, int]] = []
    bad: list[dict[str, str]] = []
    for look in tqdm(loader, total=num_read, unit="image"):
        if look.reason is not None:
            bad.append({"name": source.name(look.number), "reason": look.reason})
            continue
        # Python's integers: exact, however many images there are.
        sums = [a + b for a, b in zip(sums or [0] * len(look.sums), look.sums, strict=True)]
        squares = [a + b for a, b in zip(squares or [0] * len(look.squares), look.squares, strict=True)]
        sizes.append((look.width, look.height))
    if not sizes:
        raise DataError(f"none of {num_read} images can be read; the first is {bad[0]['name']}: {bad[0]['reason']}")
    num_pixels = len(sizes) * SIZE * SIZE
    mean = [total / num_pixels / 255 for total in sums]
    # n * sum(x^2) - sum(x)^2 in integers: no cancellation.
    std = [(num_pixels * b - a * a) ** 0.5 / num_pixels / 255 for a, b in zip(sums, squares, strict=True)]
    widths, heights = zip(*sizes, strict=True)
    return {
        "num_images": len(source),
        "num_read": num_read,
        "mean": mean,
        "std": std,
        "width": _spread(widths),
        "height": _spread(heights),
        "shorter_side": _spread([min(size) for size in sizes]),
        "classes": _classes(source),
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


def describe(stats: dict[str, Any]) -> str:
    """Returns the statistics as text. The last line is for a config."""
    rounded = {key: ", ".join(f"{value:.4f}" for value in stats[key]) for key in ("mean", "std")}
    lines = [f"images        {stats['num_images']} ({stats['num_read']} read)"]
    for key in ("width", "height", "shorter_side"):
        spread = stats[key]
        lines.append(
            f"{key.replace('_', ' '):<14}min {spread['min']}, median {spread['median']:g}, max {spread['max']} px"
        )
    classes = stats["classes"]
    if classes is None:
        lines.append("classes       none: the images are not labelled")
    else:
        spread = _spread(list(classes.values()))
        text = (
            f"{len(classes)}; images per class: min {spread['min']}, median {spread['median']:g}, max {spread['max']}"
        )
        lines.append(f"classes       {text}")
        if len(classes) <= NUM_CLASSES_SHOWN:
            lines += [f"              {name}: {count}" for name, count in classes.items()]
    lines.append(f"unreadable    {stats['num_bad']}")
    lines += [f"              {item['name']}: {item['reason']}" for item in stats["bad"][:NUM_BAD_SHOWN]]
    if stats["num_bad"] > NUM_BAD_SHOWN:
        lines.append(f"              and {stats['num_bad'] - NUM_BAD_SHOWN} more (--json lists all)")
    for severity in ("error", "warning", "count"):
        for item in stats.get("findings", {}).get(severity, []):
            text = f"{item['text']}; {item['fix']}" if item["fix"] else item["text"]
            lines.append(f"{'note' if severity == 'count' else severity:<14}{text}")
    lines += [f"mean          {rounded['mean']}", f"std           {rounded['std']}", "", "For the config:"]
    comma = "," if len(stats["mean"]) == 1 else ""
    lines.append(f"data=dict(mean=({rounded['mean']}{comma}), std=({rounded['std']}{comma}))")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="folder, tar shards (a pattern), or scenes:NUM")
    parser.add_argument("--val", metavar="DATA", help="validation images, to compare with DATA")
    parser.add_argument("--image-size", type=int, metavar="PX", help="final size of the run: counts smaller images")
    parser.add_argument(
        "--value-range", type=float, nargs=2, metavar=("BLACK", "WHITE"), help="of grey images with more than 8 bits"
    )
    parser.add_argument(
        "--max-image-pixels",
        type=int,
        default=MAX_IMAGE_PIXELS,
        metavar="N",
        help="larger images count as unreadable (default: %(default)s)",
    )
    parser.add_argument("--max-images", type=int, metavar="N", help="read only N images, evenly spread (default: all)")
    parser.add_argument("--num-workers", type=int, default=4, metavar="W", help="processes that read (default: 4)")
    parser.add_argument("--num-channels", type=int, default=3, choices=(1, 3), help="3: RGB (default), 1: grey")
    parser.add_argument("--json", action="store_true", help="print JSON, with all unreadable images and all classes")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.max_images is not None and args.max_images < 1:
        raise UserError(f"--max-images is {args.max_images}; give at least 1, or leave it out to read all")
    if args.num_workers < 0:
        raise UserError(f"--num-workers is {args.num_workers}; give 0 (this process alone) or more")
    torch.set_num_threads(1)
    value_range = None if args.value_range is None else tuple(args.value_range)
    source, val = (
        spec and open_source(spec, args.num_channels, value_range=value_range, max_image_pixels=args.max_image_pixels)
        for spec in (args.data, args.val)
    )
    findings = inspect_images(source, val, args.image_size)
    stats = {**collect(source, args.max_images, args.num_workers), "findings": findings.to_dict()}
    print(json.dumps(stats, indent=2) if args.json else describe(stats))


if __name__ == "__main__":
    run_tool(main, make_parser())
