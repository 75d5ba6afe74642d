"""Inspects a data set before training: pixel statistics, sizes, classes, bad files and likely mistakes.

Mean and deviation are per channel, in [0, 1] (of the value range, if one is given), over all pixels of the images that are
read. Each image is first resized and centre-cropped to 224 x 224 (shorter side to 256, bicubic), so images of all sizes
count the same. The deviation divides by the number of pixels. Sizes are those of the upright image before resizing.
Training logs the same findings.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from typing import Any

from mae_et.cli import image_size
from mae_et.data.decoding import MAX_IMAGE_PIXELS
from mae_et.errors import UserError

NUM_BAD_SHOWN = 10
NUM_CLASSES_SHOWN = 20
EXAMPLE = """example:
  mae-et stats /data/photos --val /data/photos_val --image-size 224
  mae-et stats '[/data/photos, /data/lists/train.csv]'
"""


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
        counts = classes.values()
        spread = f"min {min(counts)}, median {statistics.median(counts):g}, max {max(counts)}"
        lines.append(f"classes       {len(classes)}; images per class: {spread}")
        if len(classes) <= NUM_CLASSES_SHOWN:
            lines += [f"              {name}: {count}" for name, count in classes.items()]
    if stats["num_clipped"]:
        lines.append(
            f"clipped       {stats['num_clipped']} images have values outside the range: {stats['share_clipped']:.3%} of all "
            "values"
        )
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
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", metavar="DATA", help="folder, list file, table, tar shards or another source; several as '[A, B]'"
    )
    parser.add_argument("--val", metavar="DATA", help="validation images, to compare with DATA")
    parser.add_argument(
        "--image-size", type=image_size, metavar="PX", help="final size of the run, side or H,W: counts smaller images"
    )
    parser.add_argument(
        "--value-range", type=float, nargs=2, metavar=("BLACK", "WHITE"), help="of images that are not 8-bit"
    )
    parser.add_argument(
        "--max-image-pixels",
        type=int,
        default=MAX_IMAGE_PIXELS,
        metavar="N",
        help="larger images count as unreadable (default: %(default)s)",
    )
    parser.add_argument("--max-images", type=int, metavar="N", help="read only N images, evenly spread (default: all)")
    parser.add_argument(
        "--num-workers", type=int, metavar="W", help="processes that read (default: one per core, 4 at most)"
    )
    parser.add_argument(
        "--num-channels", type=int, default=3, metavar="C", help="3: RGB (default), 1: grey, or the bands"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with all unreadable images and all classes")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.max_images is not None and args.max_images < 1:
        raise UserError(f"--max-images is {args.max_images}; give at least 1, or leave it out to read all")
    if args.num_workers is not None and args.num_workers < 0:
        raise UserError(f"--num-workers is {args.num_workers}; give 0 (this process alone) or more")
    import torch  # takes seconds: after the command line is checked

    from mae_et.data.inspection import inspect_images
    from mae_et.data.sources.spec import open_source
    from mae_et.data.statistics import collect

    torch.set_num_threads(1)
    num_workers = min(4, os.cpu_count() or 1) if args.num_workers is None else args.num_workers
    value_range = None if args.value_range is None else tuple(args.value_range)
    source, val = (
        spec and open_source(spec, args.num_channels, value_range=value_range, max_image_pixels=args.max_image_pixels)
        for spec in (args.data, args.val)
    )
    findings = inspect_images(source, val, args.image_size).to_dict()
    if args.max_images is None:  # all images of DATA are read and counted below; those of --val are not
        own = ("images: ", "data.train: ")
        findings["warning"] = [
            row for row in findings["warning"] if row["kind"] != "unreadable" or not row["text"].startswith(own)
        ]
    stats = {**collect(source, args.max_images, num_workers), "findings": findings}
    print(json.dumps(stats, indent=2) if args.json else describe(stats))
