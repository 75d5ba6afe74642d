"""Probes the patch features of a frozen backbone against masks: mean IoU and Boundary IoU in minutes on a CPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from mae_et.config.dense_probe import DenseProbeConfig
from mae_et.config.files import add_config_arguments, load_probe_config

EXAMPLE = """examples:
  mae-et dense-probe dense_probe/demo --backbone work_dirs/demo
  mae-et dense-probe dense_probe/scene_mini --backbone vit_base.pth --cfg-options data.root=/data/ade20k data.image_size=512

A linear head and the nearest training patches classify the patches of each validation image; the scores are enlarged to the
size of the mask. Masks are files of class values with a classes.json, or COCO instances.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--backbone", help="run folder, or any MAE or ViT file; 'random' for untrained weights")
    parser.add_argument("--work-dir", help="where the results are written; default: work_dirs/dense_NAME_OF_CONFIG")
    parser.add_argument("--resume", action="store_true", help="repeat a finished probe of the same config")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    return parser


def main(args: argparse.Namespace) -> None:
    config = load_probe_config(DenseProbeConfig, args)
    from mae_et.tasks.dense_probe import dense_probe  # after the config is checked: this import takes seconds

    work_dir = Path(args.work_dir or f"work_dirs/dense_{Path(args.config).stem}")
    summary = dense_probe(config, work_dir, args.resume, args.device)
    for name in ("linear", "knn"):
        scores = {key: "undefined" if value is None else f"{value:.2%}" for key, value in summary[name].items()}
        print(
            f"{name:<6}  mIoU {scores['miou']}, Boundary IoU {scores['boundary_iou']}, pixel accuracy {scores['pixel_accuracy']}"
        )
    for note in summary["notes"]:
        print(f"note: {note}")
    chosen = summary["chosen"]
    print(f"linear head: lr {chosen['lr']:g}, weight decay {chosen['weight_decay']:g}, chosen on training images")
    print(f"{summary['num_val']} validation images, {summary['num_classes']} classes; all files are in {work_dir}")
