"""Draws what a masked autoencoder makes of images: one picture for each, with a row for each bandwidth.

A row shows the low frequencies that the model gets, what stays of them after masking, and the reconstruction.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import _checkout  # noqa: F401
from PIL import Image

from mae_et.cli import run_tool
from mae_et.errors import DataError, UserError

log = logging.getLogger(__name__)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
EXAMPLE = """examples:
  python tools/reconstruct.py work_dirs/demo/etpp "scenes:500@64,seed=1" --out work_dirs/demo/ladder
  python tools/reconstruct.py mae_pretrain_vit_base_full.pth photo.jpg data/val --norm-pix yes --bandwidth 96 160 224

CHECKPOINT is a run's folder (its newest checkpoint), one of its checkpoints/step_*.pt, a file exported in layout "mae" or
an official full MAE. A backbone file has no decoder and cannot reconstruct.
IMAGES are image files, folders, tar shards, scenes:NUM or torchvision:NAME@ROOT; see mae_et/data/sources/spec.py.

Where the model predicts normalised patches (norm_pix_loss), it does not say how bright a patch is: the picture gives each
removed patch its own mean and contrast back, and says so. Where it predicts histograms of oriented gradients (target "hog"),
the target's and the predicted ones are drawn as strokes along the edges.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a model with its decoder; see below")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="files, folders or other sources; see below")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("work_dirs/reconstructions"), help="default: %(default)s"
    )
    parser.add_argument(
        "--bandwidth",
        metavar="B",
        type=int,
        nargs="+",
        help="px, multiples of the patch size; default: the stages of the run, else about 3/7, 5/7 and all of the image",
    )
    parser.add_argument(
        "--mask-ratio", metavar="R", type=float, help="fraction of the patches removed; default: the run's, else 0.75"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the masks (default: %(default)s)")
    parser.add_argument(
        "--max-images",
        metavar="N",
        type=int,
        default=8,
        help="pictures of each of IMAGES, evenly spread over it (default: %(default)s)",
    )
    parser.add_argument(
        "--image-size", metavar="S", type=int, help="px of the square cut out; default: the run's, else 224"
    )
    parser.add_argument(
        "--tile", metavar="PX", type=int, default=192, help="side of each picture (default: %(default)s)"
    )
    parser.add_argument(
        "--norm-pix", choices=["yes", "no"], help="the target of an official file, which does not tell; else not needed"
    )
    parser.add_argument("--num-heads", metavar="H", type=int, help="of the encoder, where the file does not tell")
    parser.add_argument(
        "--decoder-num-heads", metavar="H", type=int, help="of the decoder, where the file does not tell"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.max_images < 1 or args.tile < 16:
        raise UserError("--max-images must be 1 or more, --tile 16 or more")
    if args.mask_ratio is not None and not 0 <= args.mask_ratio < 1:
        raise UserError(f"--mask-ratio is {args.mask_ratio}; it must be at least 0 and below 1")
    import torch  # here and below: a faulty command line is told before seconds of imports

    from mae_et.data.decoding import BadImageError
    from mae_et.data.transforms import EvalTransform
    from mae_et.evaluation.pictures import ladder, save_picture
    from mae_et.storage.backbone import load_mae

    path = newest_checkpoint(args.checkpoint)
    model, metadata = load_mae(
        path,
        args.image_size,
        num_heads=args.num_heads,
        decoder_num_heads=args.decoder_num_heads,
        norm_pix_loss=None if args.norm_pix is None else args.norm_pix == "yes",
    )
    model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    patch, channels = model.patch_size, model.in_chans
    image_size = model.grid_size[0] * patch
    bandwidths = check_bandwidths(args.bandwidth or default_bandwidths(metadata, image_size, patch), image_size, patch)
    mean, std = (
        tuple(json.loads(metadata[key])) if key in metadata else v for key, v in (("mean", MEAN), ("std", STD))
    )
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    ratio = args.mask_ratio if args.mask_ratio is not None else float(metadata.get("mask_ratio", 0.75))
    centered = bool(json.loads(metadata.get("curriculum", "{}")).get("centered", True))

    transform = EvalTransform(image_size, float(metadata.get("eval_crop_ratio", 0.875)))
    number = 0
    for name, load in wanted_images(args.images, channels, args.max_images):
        try:
            pixels = transform(load())
        except BadImageError as error:
            log.warning("left out %s: %s", name, error)
            continue
        title = (
            f"{Path(name).name}   ({path.parent.parent.name + '/' if path.name.startswith('step_') else ''}{path.name})"
        )
        picture = ladder(model, pixels, bandwidths, mean, std, ratio, centered, args.seed, title, args.tile)
        stem = re.sub(r"[^\w.-]+", "_", Path(name).stem)[:80]
        save_picture(picture, args.out / f"{number:03d}_{stem}.png")
        number += 1
    if not number:
        raise DataError("none of the images can be read; the reasons are above")
    record = {
        "checkpoint": str(args.checkpoint), "encoder_sha256": metadata.get("encoder_sha256"), "bandwidths": bandwidths,
        "mask_ratio": ratio, "seed": args.seed, "num_pictures": number,
    }  # fmt: skip
    (args.out / "reconstructions.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    kind = "HOG descriptors" if model.target == "hog" else "normalised pixels" if model.norm_pix_loss else "pixels"
    print(
        f"{path}: predicts {kind}; bandwidths {', '.join(map(str, bandwidths))}, mask ratio {ratio:g}, seed {args.seed}"
    )
    print(f"wrote {number} {'picture' if number == 1 else 'pictures'} to {args.out}")


def newest_checkpoint(path: Path) -> Path:
    """Returns the checkpoint that a path names: itself, or the newest of a run's folder."""
    from mae_et.storage.checkpoint import list_checkpoints

    if not path.is_dir():
        return path
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        raise UserError(f"{path} holds no checkpoint (checkpoints/step_*.pt); name a run's folder or a file")
    return found[-1]


def default_bandwidths(metadata: Mapping[str, str], image_size: int, patch_size: int) -> list[int]:
    """Returns the run's bandwidths, each once, or a ladder of three where the file or the size does not belong to a run."""
    if metadata.get("image_size") == str(image_size) and "bandwidths" in metadata:
        return sorted(set(json.loads(metadata["bandwidths"])))
    snapped = {max(1, round(image_size * share / patch_size)) * patch_size for share in (3 / 7, 5 / 7, 1)}
    return sorted(snapped)


def check_bandwidths(bandwidths: list[int], image_size: int, patch_size: int) -> list[int]:
    for bandwidth in bandwidths:
        if not patch_size <= bandwidth <= image_size or bandwidth % patch_size:
            raise UserError(
                f"--bandwidth {bandwidth} must be a multiple of the patch size {patch_size}, at most the image size {image_size}"
            )
    return bandwidths


def wanted_images(words: list[str], num_channels: int, most: int) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    """Yields a name and a function that decodes it, for each image to draw.

    Raises:
        DataError: if a word names no images.
    """
    import numpy as np

    from mae_et.data.decoding import decode_image
    from mae_et.data.sources.shard_names import is_shard_name
    from mae_et.data.sources.spec import open_source

    opened = [
        word if Path(word).expanduser().is_file() and not is_shard_name(word) else open_source(word, num_channels)
        for word in words
    ]
    for source in opened:
        if isinstance(source, str):
            yield source, partial(decode_image, Path(source).expanduser(), num_channels)
        else:
            for i in np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).round().astype(int)):
                yield source.name(int(i)), partial(source.load, int(i))


if __name__ == "__main__":
    run_tool(main, make_parser())
