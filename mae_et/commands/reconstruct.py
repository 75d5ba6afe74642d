"""Draws reconstructions of a masked autoencoder: one picture per image, one row per bandwidth.

A row shows the low frequencies that are the model's input, the input after masking, and the reconstruction.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mae_et.cli import image_size
from mae_et.models.sizes import size_text

EXAMPLE = """examples:
  mae-et reconstruct work_dirs/demo/etpp "scenes:500@64,seed=1" --out work_dirs/demo/ladder
  mae-et reconstruct mae_pretrain_vit_base_full.pth photo.jpg data/val --norm-pix yes --bandwidth 96 160 224

CHECKPOINT is the folder of a run (its newest checkpoint is used), one of its checkpoints/step_*.pt, a file exported in layout
"mae" or an official full MAE. A backbone file has no decoder and cannot reconstruct.
IMAGES are image files, folders, tar shards, scenes:NUM or torchvision:NAME@ROOT; see mae_et/data/sources/spec.py.

A model that predicts normalised patches (norm_pix_loss) does not predict their brightness: the picture uses the mean and
contrast of the original patches, and says so. If the model predicts histograms of oriented gradients (target "hog"), target
and prediction are drawn as strokes along the edges.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # ReconstructOptions holds the defaults
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="a model with its decoder; see below")
    add("images", metavar="IMAGES", nargs="+", help="files, folders or other sources; see below")
    out = Path("work_dirs/reconstructions")
    add("--out", metavar="DIR", type=Path, default=out, help="folder of the pictures; default: %(default)s")
    bandwidth = "px of the shorter side, multiples of the patch size; default: the run's, else about 3/7, 5/7 and all"
    add("--bandwidth", metavar="B", type=int, nargs="+", help=bandwidth)
    ratio = "fraction of the patches that is removed; default: the run's, else 0.75"
    add("--mask-ratio", metavar="R", type=float, help=ratio)
    add("--seed", type=int, help="of the masks; default: 0")
    add("--max-images", metavar="N", type=int, help="of each of IMAGES, evenly spread; default: 8")
    add("--image-size", metavar="S", type=image_size, help="px, side or H,W; default: the run's, else 224")
    add("--tile", metavar="PX", type=int, help="side of each picture; default: 192")
    norm_pix = "whether an official file predicts normalised patches; other files say so themselves"
    add("--norm-pix", choices=["yes", "no"], help=norm_pix)
    add("--num-heads", metavar="H", type=int, help="where the file does not give it")
    add("--decoder-num-heads", metavar="H", type=int, help="likewise")
    add("--device", choices=["cpu", "cuda"], default=None, help="default: cuda where there is one")
    return parser


def main(args: argparse.Namespace) -> None:
    from mae_et.tasks.reconstruct import ReconstructOptions, draw_reconstructions  # takes seconds

    options = {name: value for name, value in vars(args).items() if name in ReconstructOptions.__dataclass_fields__}
    if "norm_pix" in options:
        options["norm_pix"] = options["norm_pix"] == "yes"
    record = draw_reconstructions(args.checkpoint, args.images, args.out, ReconstructOptions(**options), args.device)
    bandwidths, number = ", ".join(map(size_text, record["bandwidths"])), record["num_pictures"]
    print(
        f"{record['file']}: predicts {record['target']}; bandwidths {bandwidths}, mask ratio {record['mask_ratio']:g}, "
        f"seed {record['seed']}"
    )
    print(f"wrote {number} {'picture' if number == 1 else 'pictures'} to {args.out}")
