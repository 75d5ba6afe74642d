"""Writes images as shuffled shards, large ones resized: JPEG files in tar shards (WebDataset), or raw pixels.

Raw shards need no decoding and several times the space. After an interruption, run the same command again: it resumes.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from mae_et.config.source_list import split_sources
from mae_et.data.decoding import MAX_IMAGE_PIXELS
from mae_et.data.sources.listing import some_of
from mae_et.data.sources.raw import RawOptions
from mae_et.data.sources.raw_writer import RawJob, RawResult, write_raw
from mae_et.data.sources.shard_writer import ShardOptions, ShardResult, shard_pattern, write_shards
from mae_et.data.sources.source import ImageSource
from mae_et.data.sources.spec import open_source
from mae_et.errors import UserError, printable

DEFAULTS, RAW_DEFAULTS = ShardOptions(), RawOptions()
EXAMPLE = """example:
  mae-et prepare /data/imagenet/train /fast/imagenet --name train --processes 16
  mae-et prepare /data/imagenet/train /fast/imagenet --encoding raw --sizes 256 128 --part 1/4
  mae-et prepare /data/tiles /fast/tiles --encoding raw --channels 5 --bits 16 --value-range 0 10000

The shorter side should be 8/7 of data.image_size or more: 256 for 224. Smaller images are not resized; as JPEG shards
they are copied byte for byte.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "images", metavar="IMAGES", help="folder with or without class folders, or another source; several as '[A, B]'"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write to; created if missing")
    parser.add_argument("--name", default="train", help="prefix of the file names (default: %(default)s)")
    parser.add_argument("--encoding", choices=["jpeg", "raw"], default="jpeg", help="default: %(default)s")
    jpeg = parser.add_argument_group("with --encoding jpeg")
    jpeg.add_argument(
        "--shorter-side",
        type=int,
        metavar="PX",
        help=f"shorter side that larger images are resized to (default: {DEFAULTS.shorter_side})",
    )
    jpeg.add_argument("--quality", type=int, metavar="Q", help=f"JPEG quality, 1 to 100 (default: {DEFAULTS.quality})")
    raw = parser.add_argument_group("with --encoding raw")
    raw.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        metavar="PX",
        help="shorter sides that larger images are resized to; with several, a crop is read from the smallest that has "
        f"enough pixels (default: {RAW_DEFAULTS.sizes[0]})",
    )
    raw.add_argument(
        "--channels", type=int, metavar="C", help="1: grey; 3: RGB; or the bands of the images (default: 3)"
    )
    raw.add_argument(
        "--bits",
        type=int,
        choices=[8, 16],
        help="of each stored value; 16 divides the value range into 65,536 steps and needs --value-range (default: 8)",
    )
    raw.add_argument("--part", metavar="I/N", help="write only every N-th shard from the I-th on, for several machines")
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
        "--value-range", type=float, nargs=2, metavar=("BLACK", "WHITE"), help="of images with more than 8 bits"
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
    for images in split_sources(args.images):
        if args.out.resolve().is_relative_to(Path(images).expanduser().resolve()):
            raise UserError(f"OUT = {args.out} lies within IMAGES = {images}; name a folder outside")
    others = {"jpeg": ("sizes", "channels", "bits", "part"), "raw": ("shorter_side", "quality")}[args.encoding]
    if useless := [f"--{key.replace('_', '-')}" for key in others if getattr(args, key) is not None]:
        raise UserError(f"{', '.join(useless)} has no effect with --encoding {args.encoding}; remove it")
    value_range = None if args.value_range is None else tuple(args.value_range)
    is_deep = args.bits == 16
    if is_deep and value_range is None:
        raise UserError(
            "--bits 16 needs --value-range BLACK WHITE, the stored values that become the darkest and brightest"
        )
    source = open_source(
        args.images,
        3 if args.channels is None else args.channels,
        value_range=value_range,
        dtype="float32" if is_deep else "uint8",
        max_image_pixels=args.max_image_pixels,
    )
    if source.labels is None:
        why, how = (getattr(source, key, "") for key in ("why_no_labels", "how_to_label"))
        print(
            f"the images are not labelled ({why}). Pre-training needs no labels. For classification, {how} first",
            flush=True,
        )
    (_write_raw if args.encoding == "raw" else _write_jpeg)(args, source)


def _write_jpeg(args: argparse.Namespace, source: ImageSource) -> None:
    options = ShardOptions(
        DEFAULTS.shorter_side if args.shorter_side is None else args.shorter_side,
        DEFAULTS.quality if args.quality is None else args.quality,
        args.images_per_shard,
        args.seed,
    )
    start = time.monotonic()
    with tqdm(total=len(source), unit="image", smoothing=0.05) as bar:
        results = write_shards(
            source, args.out, args.name, options, args.processes, args.max_bad_fraction, progress=bar.update
        )
    num_images, num_kept = (sum(getattr(result, key) for result in results) for key in ("num_images", "num_kept"))
    before, after = (sum(getattr(result, key) for result in results) / 1e6 for key in ("source_bytes", "tar_bytes"))
    print(
        f"{num_images} images in {len(results)} shards, {num_images - num_kept} resized to {options.shorter_side} px, "
        f"{num_kept} copied; {before:.1f} MB before, {after:.1f} MB now; {time.monotonic() - start:.0f} s"
    )
    _print_skipped(results, f"all are in {args.name}-manifest.json")
    print(f"use: --cfg-options {shlex.quote(f'data.train={shard_pattern(args.out, args.name, len(results))}')}")


def _write_raw(args: argparse.Namespace, source: ImageSource) -> None:
    sizes = RAW_DEFAULTS.sizes if args.sizes is None else tuple(sorted(args.sizes, reverse=True))
    dtype: Literal["uint8", "uint16"] = "uint16" if args.bits == 16 else "uint8"
    options = RawOptions(sizes, source.decoding.num_channels, args.images_per_shard, args.seed, dtype)
    job = RawJob(source, args.out, args.name, options, _parse_part(args.part or "1/1"))
    expected = job.expected_bytes()
    print(f"expected size: {expected / 1e9:.3g} GB, estimated from the sizes of some images", flush=True)
    job.check_space(expected)
    start = time.monotonic()
    with tqdm(total=sum(len(job.shards[number]) for number in job.numbers), unit="image", smoothing=0.05) as bar:
        results = write_raw(job, args.processes, args.max_bad_fraction, progress=bar.update)
    num_images, num_reduced, num_bytes = (
        sum(getattr(result, key) for result in results) for key in ("num_images", "num_reduced", "num_bytes")
    )
    print(
        f"{num_images} images in {len(results)} shards at {', '.join(map(str, sizes))} px, {num_reduced} reduced; "
        f"{num_bytes / 1e6:.1f} MB; {time.monotonic() - start:.0f} s"
    )
    for fault in (result.fault for result in results if result.fault):
        print(f"written again: {fault}")
    if num_outside := sum(result.num_outside for result in results):
        print(
            f"{num_outside} images have values beyond the value range, which were clipped; mae-et stats shows how many"
        )
    _print_skipped(results, "the index of their shard holds all")
    if args.part is not None:
        print(f"this was part {args.part}; the set can be read when all parts are written")
    value_range = f" 'data.value_range=({args.value_range[0]:g},{args.value_range[1]:g})'" if dtype == "uint16" else ""
    channels = "" if options.num_channels == 3 else f" model.in_chans={options.num_channels}"
    print(f"use: --cfg-options {shlex.quote(f'data.train={job.header_path}')} data.loading=fast{channels}{value_range}")


def _parse_part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None:
        raise UserError(f"--part is {text!r}; write I/N, for example 1/4")
    return int(match[1]), int(match[2])


def _print_skipped(results: Sequence[ShardResult | RawResult], where: str) -> None:
    skipped = [f"{printable(name)} ({reason})" for result in results for name, reason in result.skipped]
    if skipped:
        print(f"{len(skipped)} unreadable images left out: {some_of(skipped)}; {where}")
