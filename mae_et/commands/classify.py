"""Evaluates a backbone on labelled images: fine-tuning, or a linear, attentive or kNN probe."""

from __future__ import annotations

import argparse
from pathlib import Path

from mae_et.config.files import add_config_arguments, load_probe_config
from mae_et.config.schema import ClassifyConfig

EXAMPLE = """examples:
  mae-et classify demo_knn --backbone work_dirs/demo
  mae-et classify photos_knn --backbone work_dirs/photos --cfg-options data.train=/data/train data.val=/data/val
  mae-et classify photos_sweep --backbone work_dirs/photos --cfg-options data.train=/data/train labels.images_per_class=10
  torchrun --nproc_per_node 8 -m mae_et classify imagenet_finetune_base --backbone work_dirs/photos

exit codes: 0 done; 1 error; 2 faulty config; 75 stopped by SIGTERM or Ctrl-C with everything saved
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--backbone", help="run folder, or any MAE or ViT file; 'random' for untrained weights")
    parser.add_argument("--work-dir", help="where the run is written; default: work_dirs/NAME_OF_CONFIG")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume from the newest checkpoint in the work dir; start if there is none",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    return parser


def main(args: argparse.Namespace) -> None:
    config = load_probe_config(ClassifyConfig, args)
    from mae_et.tasks.classify import classify  # after the config is checked: this import takes seconds

    work_dir = Path(args.work_dir or f"work_dirs/{Path(args.config).stem}")
    summary = classify(config, work_dir, args.resume, args.device)
    if summary:
        low, high = summary["top1_interval_95"]
        top5 = f", top-5 {summary['top5']:.2%}" if summary["top5"] is not None else ""
        print(f"{config.protocol}: top-1 {summary['top1']:.2%} (95% interval {low:.2%} to {high:.2%}){top5}")
        if draws := summary.get("top1_by_draw"):
            spread = "" if summary["top1_sd"] is None else f", standard deviation {summary['top1_sd']:.2%}"
            print(f"  mean over {len(draws)} draws of {summary['num_train']} labelled images{spread}")
        for k, top1 in summary.get("top1_by_k", {}).items():
            print(f"  k = {k}: {top1:.2%}")
        for head in summary.get("chosen", []):
            print(f"  seed {head['seed']}: lr {head['lr']:g}, weight decay {head['weight_decay']:g}")
        print(f"{summary['num_val']} validation images; all files are in {work_dir}")
