"""Writes the features of every image of a data set to one file, from any backbone file.

The features lie in the order of the data set, one entry for each readable image. A JSON file beside (x.json) names the images,
their labels and classes, what was left out and why, and how the features were made.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import numpy as np

from mae_et.cli import run_tool
from mae_et.errors import DataError, UserError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
NUM_BAD_SHOWN = 5
EXAMPLE = """examples:
  python tools/extract.py work_dirs/demo/etpp/backbone.safetensors "scenes:500@64,seed=1" --out work_dirs/demo/val.npy
  python tools/extract.py mae_pretrain_vit_base.pth data/train --out train.safetensors --feature cls --precision bf16

  numpy.load("val.npy", mmap_mode="r")                          [images, width]
  safetensors.torch.load_file("train.safetensors")["features"]  [images, width]; "labels" where there are any

features:
  cls      [images, width]           the class token
  mean     [images, width]           the mean of the patch tokens, what the kNN accuracy of a pre-training uses
  patches  [images, patches, width]  all patch tokens, row by row: large
Tokens are those after the encoder's final norm; with --block N the raw output of block N (from 0; -1 is the last).

BACKBONE is our backbone.safetensors, a run's step_*.pt, timm's ViT, an official MAE; "random" for untrained weights of
--size. DATA is a folder, tar shards, scenes:NUM or torchvision:NAME@ROOT; see mae_et/data/sources/spec.py. Images are resized
and centre-cropped. Features go to disk batch by batch; memory does not grow with the data set but for its names.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone", metavar="BACKBONE", help='weights, or "random"; see below')
    parser.add_argument("data", metavar="DATA", help="images; see below")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help=".npy or .safetensors")
    parser.add_argument("--feature", choices=["cls", "mean", "patches"], default="mean", help="default: %(default)s")
    parser.add_argument("--block", metavar="N", type=int, help="raw output of this block instead of the final norm's")
    parser.add_argument(
        "--dtype", choices=["float32", "float16"], default="float32", help="on disk; default: %(default)s"
    )
    parser.add_argument(
        "--image-size", metavar="S", type=int, help="px of the square cut out; default: the file's, else 224"
    )
    parser.add_argument("--batch-size", metavar="n", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--num-workers", metavar="W", type=int, help="loader processes; default: from the cores")
    parser.add_argument(
        "--mean", metavar="M", type=float, nargs="+", help="of pixels in [0, 1]; default: the file's, else ImageNet's"
    )
    parser.add_argument("--std", metavar="D", type=float, nargs="+", help="likewise")
    parser.add_argument(
        "--crop-ratio", metavar="R", type=float, help="share of the shorter side kept; default: the file's, else 0.875"
    )
    parser.add_argument(
        "--size", default="base", help='of a "random" backbone: tiny, small, base, large or huge (default: base)'
    )
    parser.add_argument("--num-heads", metavar="H", type=int, help="where the file does not tell")
    parser.add_argument("--seed", type=int, default=0, help='of a "random" backbone (default: %(default)s)')
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the network; default: %(default)s"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    check(args)
    import torch  # here and below: a faulty command line is told before seconds of imports
    from tqdm import tqdm

    from mae_et.data.sources.spec import open_source
    from mae_et.data.stream import choose_num_workers, eval_loader, reading
    from mae_et.lowfreq import crop_and_normalize
    from mae_et.models.vit import random_vit, vit_from_state
    from mae_et.storage.atomic import atomic_path
    from mae_et.storage.backbone import read_backbone

    # ---------------------------------------------------------------- backbone and data
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # The output of a block needs no final norm, and a classifier on the mean of the patches has none.
    pool = "token" if args.block is None else "avg"
    if args.backbone == "random":
        torch.manual_seed(args.seed)
        metadata: Mapping[str, str] = {}
        model = random_vit(args.image_size or 224, args.size, num_heads=args.num_heads, global_pool=pool)
    else:
        state, metadata = read_backbone(args.backbone)
        if args.block is None and "norm.weight" not in state and "fc_norm.weight" in state:
            raise UserError(
                f"{args.backbone} is a classifier on the mean of the patches, without a norm of its tokens; give --block -1"
            )
        size = args.image_size or int(metadata.get("image_size", 224))
        model = vit_from_state(
            state, size, metadata=metadata, where=args.backbone, num_heads=args.num_heads, global_pool=pool
        )
    model = model.to(device).eval()
    image_size, channels = model.patch_embed.img_size[0], model.in_chans
    mean, std = (pixel_statistic(args, metadata, name, channels) for name in ("mean", "std"))
    if args.block is not None and not -len(model.blocks) <= args.block < len(model.blocks):
        raise UserError(f"--block {args.block}: the encoder has blocks 0 to {len(model.blocks) - 1}")
    function = feature_function(model, args.feature, args.block)
    source = open_source(args.data, channels)

    # ---------------------------------------------------------------- features, batch by batch
    workers = choose_num_workers(args.num_workers, 1, device.type == "cuda")
    crop_ratio = float(metadata.get("eval_crop_ratio", 0.875)) if args.crop_ratio is None else args.crop_ratio
    loader = eval_loader(source, np.arange(len(source)), image_size, args.batch_size, workers, crop_ratio)
    precision = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    made: dict[str, Any] = {
        "backbone": args.backbone,
        "encoder_sha256": metadata.get("encoder_sha256"),
        "data": args.data,
        "feature": args.feature,
        "block": args.block,
        "image_size": image_size,
        "crop_ratio": crop_ratio,
        "mean": mean,
        "std": std,
        "precision": args.precision,
        "dtype": args.dtype,
    }
    bad_images: dict[int, str] = {}
    used = np.zeros(len(source), bool)
    partial = args.out.with_name(f".{args.out.name}.partial")
    start = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            FeatureFile(partial, args.out.suffix, args.dtype, made) as file,
            reading(loader) as batches,
            tqdm(total=len(source), unit="image", desc=args.out.name) as bar,
            torch.inference_mode(),
            torch.autocast(device.type, precision, enabled=precision is not None),
        ):
            for batch in batches:
                bad_images.update({image.index: image.reason for image in batch.bad_images})
                if len(batch.images):
                    images = batch.images.to(device, non_blocking=True)
                    features = function(crop_and_normalize(images, image_size, mean, std)).cpu().numpy()
                    file.append(features)
                    used[batch.places.numpy()] = True
                bar.update(len(batch.labels) + len(batch.bad_images))
            if not used.any():
                raise DataError(f"none of the {len(source)} images can be read, e.g. {some_bad(source, bad_images)}")
            labels = None if source.labels is None else np.asarray(source.labels, np.int64)[used]
            file.finish(labels)
        seconds = time.monotonic() - start
        index = {
            **made,
            "shape": list(file.shape),
            "class_names": None if source.class_names is None else list(source.class_names),
            "labels": None if labels is None else labels.tolist(),
            "names": [source.name(int(i)) for i in np.flatnonzero(used)],
            "bad_images": [{"name": source.name(i), "reason": bad_images[i]} for i in sorted(bad_images)],
        }
        with atomic_path(args.out.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(index) + "\n", encoding="utf-8")
        with atomic_path(args.out) as temporary:
            os.replace(partial, temporary)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()

    if bad_images:
        print(f"left out {len(bad_images)} of {len(source)} images: {some_bad(source, bad_images)}")
    shape = " x ".join(map(str, file.shape))
    print(f"wrote {shape} {args.dtype} to {args.out} in {seconds:.1f} s ({file.shape[0] / seconds:.0f} images/s)")
    print(f"names{'' if labels is None else ' and labels'}: {args.out.with_suffix('.json')}")


def check(args: argparse.Namespace) -> None:
    """Raises a UserError for what the command line alone shows to be wrong."""
    if args.out.suffix not in (".npy", ".safetensors"):
        raise UserError(f"--out {args.out} must end in .npy or .safetensors")
    for name, low in (("batch_size", 1), ("image_size", 1), ("num_workers", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {low} or more")
    if args.crop_ratio is not None and not 0 < args.crop_ratio <= 1:
        raise UserError(f"--crop-ratio is {args.crop_ratio}; it must be above 0 and at most 1")


def pixel_statistic(args: argparse.Namespace, metadata: Mapping[str, str], name: str, channels: int) -> list[float]:
    """Returns --mean or --std: as given, else the backbone's, else ImageNet's (its average for grey images)."""
    values = getattr(args, name)
    if values is None:
        values = json.loads(metadata[name]) if name in metadata else {"mean": MEAN, "std": STD}[name]
        if len(values) != channels:
            values = [sum(values) / len(values)] * channels
    if len(values) != channels:
        raise UserError(
            f"--{name} has {len(values)} values, but the backbone takes {channels} channels; give one for each"
        )
    if name == "std" and min(values) <= 0:
        raise UserError(f"--std {values} must be above 0")
    return [float(value) for value in values]


def feature_function(model: Any, feature: str, block: int | None) -> Callable[[Any], Any]:
    """Returns [n, C, S, S] -> [n, D], or [n, L, D] for patches.

    Args:
        model: timm's VisionTransformer.
        feature: cls, mean or patches.
        block: whose raw output; None: the last one's after the final norm.
    """

    import torch

    def compute(images: Any) -> Any:
        if block is None:
            tokens = model.forward_features(images)
        else:
            number = block % len(model.blocks)
            (output,) = model.forward_intermediates(
                images, [number], return_prefix_tokens=True, stop_early=True, output_fmt="NLC", intermediates_only=True
            )
            patches, prefix = output
            tokens = torch.cat([prefix, patches], dim=1)
        tokens = tokens.float()
        if feature == "cls":
            return tokens[:, 0]
        return tokens[:, 1:].mean(dim=1) if feature == "mean" else tokens[:, 1:]

    return compute


class FeatureFile:
    """Rows that go to disk as they come, in a format whose header says at the start how many there are.

    So the header is written twice, with room to spare the first time.

    Args:
        path: of the file.
        suffix: ".npy" or ".safetensors".
        dtype: "float32" or "float16".
        notes: for the metadata of a safetensors file, as JSON.
    """

    def __init__(self, path: Path, suffix: str, dtype: str, notes: Mapping[str, Any]) -> None:
        self.path, self.suffix, self.dtype = path, suffix, np.dtype(dtype)
        self.notes = {key: json.dumps(value) for key, value in notes.items()}
        self.shape: tuple[int, ...] = ()
        self._offset = self._room = 0

    def __enter__(self) -> FeatureFile:
        self._file = open(self.path, "wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, features: np.ndarray) -> None:
        """Adds [n, ...] float32.

        Raises:
            UserError: if a value is not finite, or too large for float16.
        """
        if not self.shape:
            self.shape = (0, *features.shape[1:])
            self._write_header(None)
            self._offset = self._file.tell()
        with np.errstate(over="ignore"):
            stored = features.astype(self.dtype)
        if not np.isfinite(stored).all():
            raise UserError(
                f"a feature is {'not finite' if not np.isfinite(features).all() else 'too large for float16'}; use "
                f"--precision fp32 and --dtype float32, and see whether the backbone is damaged"
            )
        self.shape = (self.shape[0] + len(features), *self.shape[1:])
        self._file.write(stored.tobytes())

    def finish(self, labels: np.ndarray | None) -> None:
        """Adds the labels (safetensors only; npy holds one array) and writes the header that counts."""
        if self.suffix == ".safetensors" and labels is not None:
            self._file.write(labels.astype("<i8").tobytes())
        self._file.seek(0)
        self._write_header(labels)
        assert self._file.tell() == self._offset

    def _write_header(self, labels: np.ndarray | None) -> None:
        if self.suffix == ".npy":
            header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(self._file, header)  # leaves room for the first number to grow
            return
        num_bytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        kind = {"float32": "F32", "float16": "F16"}[self.dtype.name]
        entries: dict[str, Any] = {
            "__metadata__": self.notes,
            "features": {"dtype": kind, "shape": self.shape, "data_offsets": [0, num_bytes]},
        }
        if labels is not None:
            end = num_bytes + 8 * len(labels)
            entries["labels"] = {"dtype": "I64", "shape": [len(labels)], "data_offsets": [num_bytes, end]}
        text = json.dumps(entries).encode()
        self._room = self._room or (len(text) + 512) // 8 * 8  # the numbers grow, and the labels come
        self._file.write(struct.pack("<Q", self._room) + text.ljust(self._room))


def some_bad(source: Any, bad_images: Mapping[int, str]) -> str:
    shown = [f"{source.name(i)} ({bad_images[i]})" for i in sorted(bad_images)[:NUM_BAD_SHOWN]]
    return "; ".join(shown) + ("; ..." if len(bad_images) > NUM_BAD_SHOWN else "")


if __name__ == "__main__":
    run_tool(main, make_parser())
