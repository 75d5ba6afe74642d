"""Trains a detector or segmentor of mmdetection or mmsegmentation from a backbone file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mae_et.config.shipped import find_config

TASKS = ("detection", "segmentation")  # folders of the shipped configs
LAUNCHERS = ("none", "pytorch", "slurm", "mpi")

EXAMPLE = """examples:
  mae-et train detection/demo --backbone work_dirs/demo
  torchrun --nproc_per_node 8 -m mae_et train mask_rcnn_vitdet_base_coco_100e --backbone FILE --launcher pytorch

exit codes: 0 done; 1 error; 2 faulty config
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="name of a shipped config, e.g. detection/demo, or a config file"
    )
    parser.add_argument("--backbone", metavar="PATH", help="run folder, or any MAE or ViT file")
    parser.add_argument("--work-dir", metavar="DIR", help="where the run is written; default: work_dirs/NAME_OF_CONFIG")
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="CHECKPOINT", help="default: the newest in the work dir"
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision on a GPU; float16, or optim_wrapper.dtype")
    add_run_options(parser)
    return parser


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that training and evaluation share."""
    parser.add_argument("--launcher", choices=LAUNCHERS, default="none", help="default: none")
    parser.add_argument(
        "--cfg-options", nargs="+", metavar="KEY=VALUE", help="override config keys; text is taken as it is typed"
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="let checkpoints run code while they are loaded, as any pickle may",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> None:
    # After the command line is checked: these imports take seconds.
    from downstream.compat.packages import check_packages

    check_packages()
    from mmengine.dist import is_main_process

    from downstream import run
    from downstream.compat.trust import trust_checkpoints

    trust_checkpoints(args.trust_checkpoint)
    config = run.read_config(find_config(args.config, TASKS), args.cfg_options)
    config.work_dir = args.work_dir or config.get("work_dir") or f"work_dirs/{Path(args.config).stem}"
    is_resumed = run.set_start(config, args.resume)
    if args.backbone is not None and not is_resumed:  # the checkpoint has all weights; the file may not exist any more
        run.set_backbone(config, args.backbone)
    run.prepare(config, args.launcher, args.amp)
    run.train(config)
    if is_main_process():
        print_summary(Path(config.work_dir))


def print_summary(work_dir: Path) -> None:
    metrics = json.loads((work_dir / "summary.json").read_text(encoding="utf-8"))["metrics"]
    shown = [f"{name} {value:g}" for name, value in metrics.items() if name.endswith(("bbox_mAP", "segm_mAP", "mIoU"))]
    if shown:
        print(", ".join(shown))
    print(f"results are in {work_dir}; {work_dir / 'summary.json'} has the summary")
