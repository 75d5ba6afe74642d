"""Predicts with a trained classifier, detector or segmentor: what is in new images."""

from __future__ import annotations

import argparse
from pathlib import Path

from downstream.commands.train import TASKS
from mae_et.config.shipped import find_config
from mae_et.errors import UserError

EXAMPLE = """examples:
  mae-et predict work_dirs/demo/finetune photo.jpg photos/ "more/*.png" --out work_dirs/predictions
  mae-et predict classifier.safetensors photos/ --out work_dirs/predictions --pictures --top-k 3
  mae-et predict work_dirs/demo/detection/epoch_1.pth photos/ --config detection/demo --out work_dirs/boxes --pictures

CHECKPOINT is a classifier.safetensors of `mae-et classify` or `mae-et supervised`, or the folder of that run. With --config
it is a checkpoint of `mae-et train`. Images are prepared as in the evaluation of the run.

written to --out:
  classifier  predictions.csv, predictions.json: the most likely classes of each image
  detector    predictions.json: COCO format, with scores, and masks as RLE where the detector has them
  segmentor   predictions.json and masks/: PNG files whose pixel values are the class indices
  --pictures  pictures/: the images with the predictions drawn
Images that cannot be read are counted and named; the others are done.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # PredictOptions holds the defaults
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="see below")
    add("images", metavar="IMAGES", nargs="+", help='files, folders, or patterns such as "photos/**/*.jpg"')
    add("--out", metavar="DIR", type=Path, required=True, help="a new or empty folder")
    add("--overwrite", action="store_true", help="replace earlier predictions in --out")
    add("--pictures", action="store_true", help="draw the predictions")
    channels = "one or three channels to draw, counted from 0; default: the first three, or the first of one or two"
    add("--channels", metavar="C", type=int, nargs="+", help=channels)
    add("--device", choices=["cpu", "cuda"], default=None, help="default: cuda where there is one")
    classifier = parser.add_argument_group("classifiers")
    classifier.add_argument("--top-k", metavar="K", type=int, help="classes of each image; default: 5")
    names = "text file with the name of class n in line n (from 0), where the checkpoint has no names"
    classifier.add_argument("--classes", metavar="FILE", type=Path, default=None, help=names)
    classifier.add_argument("--batch-size", metavar="n", type=int, help="default: 64")
    classifier.add_argument("--num-workers", metavar="W", type=int, help="loader processes; default: from the cores")
    classifier.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: fp32")
    dense = parser.add_argument_group("detectors and segmentors")
    config = "config of the training: a file or the name of a shipped one"
    dense.add_argument("--config", metavar="CONFIG", default=None, help=config)
    score = "lowest score of a detection that is drawn; predictions.json has all; default: 0.3"
    dense.add_argument("--score", metavar="S", type=float, help=score)
    dense.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", help="override keys of the config")
    trust = "let the checkpoint run code while it is loaded, as any pickle may"
    dense.add_argument("--trust-checkpoint", action="store_true", default=False, help=trust)
    return parser


CLASSIFIER_ONLY = ("top_k", "batch_size", "num_workers", "precision")
DENSE_ONLY = ("score", "cfg_options")


def main(args: argparse.Namespace) -> None:
    given = vars(args)
    unused = CLASSIFIER_ONLY if args.config else DENSE_ONLY
    words = [f"--{name.replace('_', '-')}" for name in unused if name in given]
    if args.config and args.classes:
        words.append("--classes")
    if words:
        why = "with --config, the checkpoint is a detector or segmentor" if args.config else "it needs --config"
        raise UserError(f"{', '.join(words)} would have no effect: {why}. Leave it out")
    if args.config:
        _predict_dense(args)
        return
    if Path(args.checkpoint).suffix == ".pth" and Path(args.checkpoint).is_file():
        beside = sorted(Path(args.checkpoint).parent.glob("*.py"))
        example = beside[0] if beside else "detection/demo"
        raise UserError(
            f"{args.checkpoint} is no classifier.safetensors. If it is a detector or segmentor, add --config with the config of "
            f"its training, e.g. --config {example}. A classifier comes from `mae-et classify` or `mae-et supervised`"
        )
    from mae_et.tasks.predict import PredictOptions, predict  # after the command line is checked: takes seconds

    options = {name: value for name, value in given.items() if name in PredictOptions.__dataclass_fields__}
    names = _read_names(args.classes) if args.classes else None
    record = predict(args.checkpoint, args.images, args.out, PredictOptions(**options), names, args.device)
    _print_result(len(record["predictions"]), len(record["bad_images"]), args.out)


def _predict_dense(args: argparse.Namespace) -> None:
    from downstream.compat.packages import check_packages

    check_packages()
    from downstream.compat.trust import trust_checkpoints
    from downstream.predict import predict_dense

    trust_checkpoints(args.trust_checkpoint)
    given = vars(args)
    record = predict_dense(
        find_config(args.config, TASKS), given.get("cfg_options"), args.checkpoint, args.images, args.out,
        pictures=given.get("pictures", False), score=given.get("score", 0.3), overwrite=given.get("overwrite", False),
        device=args.device, channels=given.get("channels"),
    )  # fmt: skip
    _print_result(len(record["images"]), len(record["bad_images"]), args.out)


def _read_names(path: Path) -> list[str]:
    names = path.read_text(encoding="utf-8-sig").splitlines()
    if not names or not all(name.strip() for name in names):
        raise UserError(f"{path} has an empty line or none: write the name of class n in line n")
    return [name.strip() for name in names]


def _print_result(num: int, num_bad: int, out: Path) -> None:
    left_out = f"; {num_bad} cannot be read, see bad_images in predictions.json" if num_bad else ""
    print(f"wrote the predictions for {num} {'image' if num == 1 else 'images'} to {out}{left_out}")
