"""Trains a classifier under the curriculum: ResNet, ConvNeXt, DeiT, PVT, Swin, CSWin, CAFormer, any timm model."""

from __future__ import annotations

import argparse
from pathlib import Path

from mae_et.config.files import add_config_arguments, load_config
from mae_et.config.supervised import SupervisedConfig

EXAMPLE = """examples:
  mae-et supervised swin_tiny --cfg-options data.train=/data/imagenet/train data.val=/data/imagenet/val
  mae-et supervised swin_tiny --cfg-options model.name=regnety_008 data.train=/data/train data.val=/data/val
  torchrun --nproc_per_node 8 -m mae_et supervised convnext_base

exit codes: 0 done; 1 error; 2 faulty config; 75 stopped by SIGTERM or Ctrl-C with everything saved
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--work-dir", help="where the run is written; default: work_dirs/NAME_OF_CONFIG")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume from the newest checkpoint in the work dir; start if there is none",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    return parser


def main(args: argparse.Namespace) -> None:
    config = load_config(SupervisedConfig, args.config, args.cfg_options)
    from mae_et.tasks.supervised import train_supervised  # after the config is checked: this import takes seconds

    work_dir = Path(args.work_dir or f"work_dirs/{Path(args.config).stem}")
    summary = train_supervised(config, work_dir, args.resume, args.device)
    if not summary:
        return
    if summary["top1"] is not None:
        low, high = summary["top1_interval_95"]
        top5 = f", top-5 {summary['top5']:.2%}" if summary["top5"] is not None else ""
        print(f"{config.model.name}: top-1 {summary['top1']:.2%} (95% interval {low:.2%} to {high:.2%}){top5}")
        print(f"{summary['num_val']} validation images; all files are in {work_dir}")
    else:
        print(f"{config.model.name}: trained without validation images; all files are in {work_dir}")
    print(
        "to load the classifier (with timm alone: docs/guides/supervised.md):\n"
        "from mae_et.tasks.classifier_file import load_classifier\n\n"
        f"model = load_classifier({str(work_dir / 'classifier.safetensors')!r}).model"
    )
