"""Writes the features of all images of a data set to one file.

The features are in the order of the data set, one entry for each readable image. A JSON file beside (x.json) gives the names,
labels and classes of the images, the images that were left out and why, and how the features were computed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mae_et.cli import image_size

EXAMPLE = """examples:
  mae-et extract work_dirs/demo/etpp/backbone.safetensors "scenes:500@64,seed=1" --out work_dirs/demo/val.npy
  torchrun --nproc_per_node 8 -m mae_et extract vit_base.pth data/train --out train.safetensors --feature cls --precision bf16

  numpy.load("val.npy", mmap_mode="r")                          [images, width]
  safetensors.torch.load_file("train.safetensors")["features"]  [images, width]; "labels" where there are any

features:
  cls      [images, width]           the class token
  mean     [images, width]           the mean of the patch tokens, as in the kNN accuracy of a pre-training
  patches  [images, patches, width]  all patch tokens, row by row; large
The tokens are those after the final norm of the encoder. With --block N they are the raw output of block N (from 0; -1 is
the last).

BACKBONE is a backbone.safetensors, a checkpoint of a run, a ViT of timm, an official MAE, or "random" for untrained weights
of --size. DATA is a folder, tar shards, scenes:NUM or torchvision:NAME@ROOT; see mae_et/data/sources/spec.py. Images are
resized and centre-cropped. Features are written batch by batch; memory does not grow with the data set except for its names.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # FeatureOptions holds the defaults
    )
    add = parser.add_argument
    add("backbone", metavar="BACKBONE", help='weights, or "random"; see below')
    add("data", metavar="DATA", help="images; see below")
    add("--out", metavar="FILE", type=Path, required=True, help="a new .npy or .safetensors file")
    add("--feature", choices=["cls", "mean", "patches"], help="default: mean")
    add("--block", metavar="N", type=int, help="use the raw output of this block")
    add("--dtype", choices=["float32", "float16"], help="of the file; default: float32")
    add("--image-size", metavar="S", type=image_size, help="px, side or H,W; default: the backbone's, else 224")
    add("--batch-size", metavar="n", type=int, help="of each process; default: 64")
    add("--num-workers", metavar="W", type=int, help="loader processes; default: from the cores")
    mean = "of pixels in [0, 1]; default: the backbone's, else ImageNet's"
    add("--mean", metavar="M", type=float, nargs="+", help=mean)
    add("--std", metavar="D", type=float, nargs="+", help="default: likewise")
    crop = "share of the shorter side that is kept; default: the backbone's, else 0.875"
    add("--crop-ratio", metavar="R", type=float, help=crop)
    size = 'of a "random" backbone: tiny, small, base, large or huge; default: base'
    add("--size", help=size)
    add("--num-heads", metavar="H", type=int, help="where the backbone file does not give it")
    add("--seed", type=int, help='of a "random" backbone; default: 0')
    add("--precision", choices=["fp32", "bf16", "fp16"], help="of the network; default: fp32")
    add("--device", choices=["cpu", "cuda"], default=None, help="default: cuda where there is one")
    return parser


def main(args: argparse.Namespace) -> None:
    from mae_et.tasks.features import FeatureOptions, extract  # after the command line is checked: takes seconds

    options = {name: value for name, value in vars(args).items() if name in FeatureOptions.__dataclass_fields__}
    index = extract(args.backbone, args.data, args.out, FeatureOptions(**options), args.device)
    if index is not None:
        shape, rate = " x ".join(map(str, index["shape"])), index["shape"][0] / index["seconds"]
        print(f"wrote {shape} {index['dtype']} to {args.out} in {index['seconds']:.1f} s ({rate:.0f} images/s)")
        print(f"names{'' if index['labels'] is None else ' and labels'}: {args.out.with_suffix('.json')}")
