"""Evaluates a detector or segmentor on the test set of its config."""

from __future__ import annotations

import argparse
from pathlib import Path

from downstream.commands.train import TASKS, add_run_options
from mae_et.config.shipped import find_config

EXAMPLE = """example:
  mae-et test detection/demo work_dirs/demo/detection/epoch_1.pth --show-dir work_dirs/demo/drawn
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="the config of the training: a file or the name of a shipped one"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="epoch_*.pth or iter_*.pth")
    parser.add_argument("--work-dir", metavar="DIR", help="default: work_dirs/NAME_OF_CONFIG")
    parser.add_argument("--show-dir", metavar="DIR", help="draw the predictions on all images of the test set")
    parser.add_argument("--tta", action="store_true", help="several scales and flips, by the config's tta_pipeline")
    add_run_options(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    # After the command line is checked: these imports take seconds.
    from downstream.compat.packages import check_packages

    check_packages()
    from downstream import run
    from downstream.compat.trust import trust_checkpoints

    trust_checkpoints(args.trust_checkpoint)
    config = run.read_config(find_config(args.config, TASKS), args.cfg_options)
    config.work_dir = args.work_dir or config.get("work_dir") or f"work_dirs/{Path(args.config).stem}"
    if args.show_dir is not None:
        config.default_hooks.visualization.update(draw=True, interval=1)
        config.visualizer.save_dir = args.show_dir
    run.prepare(config, args.launcher)
    metrics = run.evaluate(config, args.checkpoint, args.tta)
    for name, value in metrics.items():
        print(f"{name}: {value}")
