"""Writes images as shuffled tar shards in WebDataset layout, large images resized.

Run the same command again to continue after an interruption.
"""

from __future__ import annotations

import argparse
import os
import shlex
import time
from pathlib import Path

from tqdm import tqdm

from mae_et.data.decoding import MAX_IMAGE_PIXELS
from mae_et.data.sources.listing import some_of
from mae_et.data.sources.shard_writer import ShardOptions, shard_pattern, write_shards
from mae_et.data.sources.spec import open_source
from mae_et.errors import UserError, printable

DEFAULTS = ShardOptions()
EXAMPLE = """example:
  mae-et prepare /data/imagenet/train /fast/imagenet --name train --processes 16

The shorter side should be 8/7 of data.image_size or more: 256 for 224. Smaller images are copied byte for byte.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", metavar="IMAGES", help="folder with or without class folders, or tar shards")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write to; created if missing")
    parser.add_argument("--name", default="train", help="prefix of the file names (default: %(default)s)")
    parser.add_argument(
        "--shorter-side",
        type=int,
        default=DEFAULTS.shorter_side,
        metavar="PX",
        help="shorter side that larger images are resized to (default: %(default)s)",
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=DEFAULTS.quality,
        metavar="Q",
        help="JPEG quality, 1 to 100 (default: %(default)s)",
    )
    parser.add_argument(
        "--images-per-shard",
        type=int,
        default=DEFAULTS.images_per_shard,
        metavar="N",
        help="upper limit (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the order (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one per core")
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="limit for the share of unreadable images (default: %(default)s)",
    )
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
    return parser


def main(args: argparse.Namespace) -> None:
    if args.processes < 1 or not 0 <= args.max_bad_fraction <= 1:
        raise UserError("--processes must be at least 1, --max-bad-fraction in 0..1")
    if not args.name or set(args.name) & set("/{}*?[]") or set(str(args.out)) & set("{}*?[]"):
        raise UserError(
            f"--name {args.name!r} or OUT {printable(str(args.out))!r} holds braces, brackets, * or ? (read as a pattern) "
            "or --name holds / (read as a folder); choose other names"
        )
    if args.out.resolve().is_relative_to(Path(args.images).expanduser().resolve()):
        raise UserError(f"OUT = {args.out} lies within IMAGES = {args.images}; name a folder outside")
    options = ShardOptions(args.shorter_side, args.quality, args.images_per_shard, args.seed)
    value_range = None if args.value_range is None else tuple(args.value_range)
    source = open_source(args.images, value_range=value_range, max_image_pixels=args.max_image_pixels)
    if source.labels is None:
        why, how = (getattr(source, key, "") for key in ("why_no_labels", "how_to_label"))
        print(
            f"the images are not labelled ({why}). Pre-training needs no labels. For classification, {how} first",
            flush=True,
        )
    start = time.monotonic()
    with tqdm(total=len(source), unit="image", smoothing=0.05) as bar:
        results = write_shards(
            source, args.out, args.name, options, args.processes, args.max_bad_fraction, progress=bar.update
        )

    num_images, num_kept = (sum(getattr(result, key) for result in results) for key in ("num_images", "num_kept"))
    before, after = (sum(getattr(result, key) for result in results) / 1e6 for key in ("source_bytes", "tar_bytes"))
    print(
        f"{num_images} images in {len(results)} shards, {num_images - num_kept} resized to {args.shorter_side} px, "
        f"{num_kept} copied; {before:.1f} MB before, {after:.1f} MB now; {time.monotonic() - start:.0f} s"
    )
    skipped = [f"{printable(name)} ({reason})" for result in results for name, reason in result.skipped]
    if skipped:
        print(f"{len(skipped)} unreadable images left out: {some_of(skipped)}; all are in {args.name}-manifest.json")
    print(f"use: --cfg-options {shlex.quote(f'data.train={shard_pattern(args.out, args.name, len(results))}')}")
