"""Checks that pre-training, timm, transformers, detection and segmentation read the same features from a file.

Prints which keys were loaded where, and the largest difference of the features.
"""

from __future__ import annotations

import argparse

EXAMPLE = """examples:
  mae-et doctor work_dirs/demo
  mae-et doctor mae_pretrain_vit_base.pth

exit codes: 0 all agree to 1e-4; 1 they do not agree, or the file does not load
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "backbone", metavar="BACKBONE", help="the folder of a run, a checkpoint, or any MAE or ViT file"
    )
    parser.add_argument(
        "--num-heads", type=int, metavar="N", help="number of attention heads, if the file does not record it"
    )
    return parser


def main(args: argparse.Namespace) -> int:
    from downstream.doctor import TOLERANCE, examine  # imports torch, which takes seconds

    report = examine(args.backbone, args.num_heads)
    print(f"{args.backbone}: {report.architecture}")
    for name, account in report.accounts.items():
        print(f"\n{name}")
        print(f"  loaded ({len(account.arrived)}): {', '.join(account.arrived)}")
        for key, how in account.changed.items():
            print(f"  changed: {key} {how}")
        print(f"  left out ({len(account.left_out)}): {', '.join(account.left_out) or 'nothing'}")
        print(f"  new ({len(account.new)}): {', '.join(account.new) or 'nothing'}")
    print(f"\nlargest difference, in units of the features' standard deviation (limit {TOLERANCE:g}):")
    for comparison in report.comparisons:
        print(f"  {'ok  ' if comparison.passed else 'FAIL'} {comparison.difference:.1e}  {comparison.what}")
    for note in report.notes:
        print(f"  {note}")
    return 0 if report.passed else 1
