"""Draws what a backbone sees: principal components, attention, similar patches, similar images, UMAP."""

from __future__ import annotations

import argparse
from pathlib import Path

from mae_et.cli import image_size

EXAMPLE = """examples:
  mae-et show pca work_dirs/demo/etpp photos/ --out work_dirs/pca --image-size 448
  mae-et show attention vit_base.pth photo.jpg --out work_dirs/attention
  mae-et show similarity work_dirs/demo/etpp one.jpg other.jpg --out work_dirs/similarity --patch 7 3
  mae-et show neighbours work_dirs/demo/etpp photo.jpg --folder photos/ --out work_dirs/neighbours
  mae-et show duplicates work_dirs/demo/etpp photos/ --out work_dirs/duplicates --threshold 0.99
  mae-et show umap work_dirs/demo/etpp data/val --out work_dirs/umap

BACKBONE is a backbone.safetensors or the folder of a run, any MAE or ViT file, or "random". The backbone of
`mae-et supervised` may be any model of timm; only ViTs with a cls token have attention to show.
IMAGES are files, folders and patterns such as "photos/**/*.jpg"; for umap also one source as of `mae-et extract`, whose labels
give the colours. They are resized and centre-cropped as in the evaluation.
Images that cannot be read are counted and named; the others are done.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_kind(kinds, "pca", "the first three principal components of the patch features as red, green and blue")
    attention = _add_kind(kinds, "attention", "the attention of the cls token to the patches, for each head")
    attention.add_argument("--block", metavar="N", type=int, help="from 0; default: -1, the last")
    similarity = _add_kind(kinds, "similarity", "the similarity of one patch with all patches of all images")
    patch = "of the first image, from 0 at the top left"
    similarity.add_argument("--patch", metavar=("ROW", "COLUMN"), type=int, nargs=2, required=True, help=patch)
    neighbours = _add_kind(kinds, "neighbours", "the most similar images of a folder, as CSV and HTML")
    neighbours.add_argument("--folder", metavar="DIR", required=True, help="images to search, or a pattern of them")
    neighbours.add_argument("--k", type=int, help="neighbours of each image; default: 8")
    duplicates = _add_kind(kinds, "duplicates", "pairs of nearly equal images, as CSV and HTML")
    threshold = "lowest cosine similarity of a pair; default: 0.98"
    duplicates.add_argument("--threshold", metavar="T", type=float, help=threshold)
    umap = _add_kind(
        kinds, "umap", "the features of all images on a plane, as CSV and picture (extra mae_et[umap])", False
    )
    umap.add_argument("--seed", type=int, help="of UMAP; default: 0")
    return parser


def _add_kind(
    kinds: argparse._SubParsersAction, name: str, text: str, draws_images: bool = True
) -> argparse.ArgumentParser:
    # ShowOptions and the functions of mae_et.tasks.show hold the defaults.
    kind = kinds.add_parser(
        name,
        prog=f"mae-et show {name}",
        help=text,
        description=f"Draws {text}.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = kind.add_argument
    add("--debug", action="store_true", help="show the traceback of an error")
    add("backbone", metavar="BACKBONE", help='a file, the folder of a run, or "random"')
    add("images", metavar="IMAGES", nargs="+", help="files, folders or patterns")
    add("--out", metavar="DIR", type=Path, required=True, help="a new or empty folder")
    add("--overwrite", action="store_true", help="replace earlier results in --out")
    size = "px, side or H,W, more for finer pictures; default: the backbone's, else 224"
    add("--image-size", metavar="S", type=image_size, help=size)
    crop = "share of the shorter side that is kept; default: the backbone's, else 0.875"
    add("--crop-ratio", metavar="R", type=float, help=crop)
    if draws_images:
        channels = "one or three channels to draw, counted from 0; default: the first three, or the first of one or two"
        add("--channels", metavar="C", type=int, nargs="+", help=channels)
    add("--batch-size", metavar="n", type=int, help="default: 32")
    add("--num-workers", metavar="W", type=int, help="loader processes; default: from the cores")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    return kind


def main(args: argparse.Namespace) -> None:
    from mae_et.tasks import show  # after the command line is checked: takes seconds
    from mae_et.tasks.viewer import ShowOptions

    given = vars(args)
    options = {name: value for name, value in given.items() if name in ShowOptions.__dataclass_fields__}
    own = {name: given[name] for name in ("block", "patch", "folder", "k", "threshold", "seed") if name in given}
    if "patch" in own:
        own["patch"] = tuple(own["patch"])
    function = getattr(show, f"show_{args.kind}")
    record = function(args.backbone, args.images, args.out, ShowOptions(**options), **own)
    number = len(record["images"])
    found = f"; {record['num_pairs']} pairs" if "num_pairs" in record else ""
    print(f"wrote {args.kind} of {number} {'image' if number == 1 else 'images'} to {args.out}{found}")
