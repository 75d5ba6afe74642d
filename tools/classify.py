"""Judges a backbone on labelled images: `python tools/classify.py CONFIG --backbone FILE [--work-dir DIR] [--resume]`."""

import argparse
from pathlib import Path

import _checkout  # noqa: F401

from mae_et.cli import run_tool
from mae_et.config.files import add_config_arguments, load_config
from mae_et.config.schema import ClassifyConfig
from mae_et.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune a backbone, probe it linearly, or classify by its nearest neighbours.",
        epilog="example: python tools/classify.py configs/classification/cifar10_knn.py "
        "--backbone work_dirs/cifar10_etpp/backbone.safetensors",
    )
    add_config_arguments(parser)
    parser.add_argument("--backbone", help="ours, timm's or the official MAE's file; 'random' for untrained weights")
    parser.add_argument("--work-dir", help="where the run is written; default: work_dirs/NAME_OF_CONFIG")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the work dir")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    return parser


def main(args: argparse.Namespace) -> None:
    overrides = dict(args.cfg_options)
    if args.backbone is not None:
        overrides["backbone"] = None if args.backbone == "random" else args.backbone
    config = load_config(ClassifyConfig, args.config, overrides)
    if config.backbone is None and args.backbone is None:
        raise UserError("no backbone: give --backbone FILE, or --backbone random for untrained weights")
    from mae_et.tasks.classify import classify  # after the config is checked: this import takes seconds

    work_dir = Path(args.work_dir or f"work_dirs/{Path(args.config).stem}")
    summary = classify(config, work_dir, args.resume, args.device)
    if summary:
        low, high = summary["top1_interval_95"]
        top5 = f", top-5 {summary['top5']:.2%}" if summary["top5"] is not None else ""
        print(f"{config.protocol}: top-1 {summary['top1']:.2%} (95% interval {low:.2%} to {high:.2%}){top5}")
        for k, top1 in summary.get("top1_by_k", {}).items():
            print(f"  k = {k}: {top1:.2%}")
        print(f"{summary['num_val']} validation images; everything is in {work_dir}")


if __name__ == "__main__":
    run_tool(main, make_parser())
