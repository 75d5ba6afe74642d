"""Writes a report of all runs below some folders: verdict, cost and transfer results."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """examples:
  mae-et report work_dirs --out work_dirs/report
  mae-et report results --out results/report --baseline "constant 224, 1600 eq. epochs"
  mae-et report work_dirs --out report --query "data == 'imagenet' and equivalent_epochs >= 100"

RUNS are folders. Every run at or below them is found: pre-training, classification, detection, segmentation, evaluations,
features of `mae-et extract` and pictures of `mae-et reconstruct`. Unfinished, broken and copied runs are listed with the
reason and are in no mean.

docs/guides/report.md lists the columns of --query and says how the numbers are made.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUNS", nargs="+", type=Path, help="folders; see below")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="for report.html, .md, .json, tables/, figures/"
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="run or group to compare with; default: the largest budget at full size, else random weights",
    )
    parser.add_argument(
        "--query", metavar="EXPR", help="keep only these runs, e.g. \"kind == 'pretrain' and seed < 3\" (pandas query)"
    )
    parser.add_argument(
        "--group-by",
        metavar="COLUMN",
        nargs="+",
        default=[],
        help="average pre-trainings that agree in these columns; default: in all but the seed",
    )
    parser.add_argument("--title", default="Transfer benchmark", help="default: %(default)s")
    parser.add_argument("--no-pictures", action="store_true", help="embed no pictures of runs")
    return parser


def main(args: argparse.Namespace) -> None:
    from mae_et.report.join import make_benchmark  # takes seconds: after the command line is checked
    from mae_et.report.page import counts, write_report

    benchmark = make_benchmark(args.runs, args.baseline, args.query, args.group_by)
    write_report(benchmark, args.out, args.title, not args.no_pictures)
    print(f"{args.out / 'report.html'}: {counts(benchmark)}")
