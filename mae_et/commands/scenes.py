"""Writes generated scenes to disk, as an image folder or in the layout of COCO or ADE20K.

Needs no download.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mae_et.data.scenes.files import split_indices, write_ade20k, write_coco, write_image_folder
from mae_et.data.scenes.painter import make_scene
from mae_et.errors import DataError, UserError

NOTE = "demo_data.json"
# What each layout writes below OUT, and how it is shown at the end.
ENTRIES = {
    "folder": {"train": "train/<class>/*.jpg", "val": "val/<class>/*.jpg"},
    "coco": {
        "train2017": "train2017/*.jpg",
        "val2017": "val2017/*.jpg",
        "annotations": "annotations/instances_{train,val}2017.json",
    },
    "ade20k": {
        "images": "images/{training,validation}/*.jpg",
        "annotations": "annotations/{training,validation}/*.png",
        "classes.json": "classes.json",
    },
}
EXAMPLE = """example:
  mae-et scenes data/demo --layout folder --num-train 10000 --num-val 1000 --image-size 96

layouts:
  folder  OUT/{train,val}/<class>/*.jpg, for pre-training and classification
  coco    OUT/{train,val}2017 and OUT/annotations/instances_*.json, for detection and instance segmentation
  ade20k  OUT/images and OUT/annotations/{training,validation}, for semantic segmentation

The scenes follow from the seed alone, and no validation scene is ever a training scene.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write to; created if missing")
    parser.add_argument("--layout", choices=sorted(ENTRIES), default="folder", help="default: %(default)s")
    parser.add_argument(
        "--num-train", type=int, default=2000, metavar="N", help="training scenes (default: %(default)s)"
    )
    parser.add_argument(
        "--num-val", type=int, default=200, metavar="M", help="validation scenes, 0 for none (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        default=[96],
        metavar=("H", "W"),
        help="height and width in px, one number for a square; at least 32 (default: 96)",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes (default: %(default)s)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what this tool wrote to OUT before; nothing else is removed"
    )
    return parser


def prepare_folder(out: Path, overwrite: bool) -> None:
    """Makes an empty folder of out, or refuses.

    Raises:
        UserError: if out holds something, unless overwrite is given and this tool wrote it.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out} is not empty; name another folder or give --overwrite to replace its demo data")
        if not (out / NOTE).is_file():
            raise UserError(
                f"{out} was not written by this tool (no {NOTE} there), so nothing is removed; name another"
            )
        try:
            layout = json.loads((out / NOTE).read_text(encoding="utf-8"))["layout"]
            entries = [*ENTRIES[layout], NOTE]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{out / NOTE} is damaged; remove {out} yourself or name another folder") from error
        for entry in entries:
            if (out / entry).is_dir():
                shutil.rmtree(out / entry)
            else:
                (out / entry).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


def main(args: argparse.Namespace) -> None:
    if len(args.image_size) > 2:
        raise UserError(f"--image-size takes one or two numbers, not {len(args.image_size)}")
    size = (args.image_size[0], args.image_size[-1])
    if args.num_train < 1:
        raise UserError(f"--num-train is {args.num_train}; it must be 1 or more")
    splits = split_indices(args.num_train, args.num_val)
    make_scene(0, size, args.seed)  # a bad size or seed ends here, before anything is removed
    try:
        prepare_folder(args.out, args.overwrite)
        note: dict[str, Any] = {
            "made_by": "mae-et scenes",
            "layout": args.layout,
            "num_train": args.num_train,
            "num_val": args.num_val,
            "image_size": size,
            "seed": args.seed,
        }
        # Written first, so that --overwrite can also clear up after a run that was stopped.
        (args.out / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write to {args.out}: {error.strerror or error}") from error

    start = time.monotonic()
    with tqdm(total=args.num_train + args.num_val, unit="scene", desc=args.layout) as bar:

        def progress(indices: Iterable[int]) -> Iterator[int]:
            for index in indices:
                yield index
                bar.update()

        if args.layout == "folder":
            for split, indices in splits.items():
                write_image_folder(args.out, len(indices), size, args.seed, indices.start, split, progress=progress)
        else:
            write = write_coco if args.layout == "coco" else write_ade20k
            write(args.out, args.num_train, args.num_val, size, args.seed, progress=progress)

    megabytes = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file()) / 1e6
    print(
        f"wrote {args.num_train} training and {args.num_val} validation scenes of {size[0]} x {size[1]} px "
        f"(seed {args.seed}, {megabytes:.1f} MB, {time.monotonic() - start:.1f} s) to {args.out}"
    )
    for entry, shown in ENTRIES[args.layout].items():
        if (args.out / entry).exists():
            print(f"  {args.out / shown}")
