"""Turns run folders into a benchmark report: `python tools/report.py RUNS... --out DIR`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import _checkout  # noqa: F401

from mae_et.cli import run_tool
from mae_et.errors import UserError

WATCH_SECONDS = 30.0
EXAMPLE = """examples:
  python tools/report.py work_dirs --out work_dirs/report
  python tools/report.py results --out results/report --baseline "constant 224, 1600 eq. epochs"
  python tools/report.py work_dirs --out report --filter "data=imagenet, equivalent_epochs>=100" --watch

RUNS are folders; every run at or below them is found: pre-training, classification, detection, segmentation and their
evaluations, features of tools/extract.py, pictures of tools/reconstruct.py. A run that is unfinished, broken or a copy is
listed with the reason and is in no mean.

--filter takes conditions that all have to hold, KEY OPERATOR VALUE with = != < <= > >= ~ (a regular expression). Keys are
those of report.json's facts and of the configs; a result that lacks one is asked for its pre-training's.

docs/report.md says how the numbers are made.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUNS", nargs="+", type=Path, help="folders; see below")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="gets report.html, .md, .json, tables/, figures/"
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="run or group to compare with; default: the largest one at full size, else random weights",
    )
    parser.add_argument("--filter", metavar="EXPR", help='leave out other runs, e.g. "data=CIFAR10, seed<3"; see below')
    parser.add_argument(
        "--group-by",
        metavar="KEY",
        nargs="+",
        default=[],
        help="average pre-trainings that agree in these; default: in all but the seed",
    )
    parser.add_argument("--title", default="Transfer benchmark", help="default: %(default)s")
    parser.add_argument("--no-pictures", action="store_true", help="put no picture of any run into the page")
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        nargs="?",
        type=float,
        const=WATCH_SECONDS,
        help=f"write it anew every SECONDS (default: {WATCH_SECONDS:g}) until Ctrl-C",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    if args.watch is not None and not args.watch > 0:
        raise UserError(f"--watch {args.watch:g}: give seconds above 0")
    write(args)
    while args.watch is not None:
        time.sleep(args.watch)
        try:
            write(args)
        except UserError as error:  # runs come and go while others write them
            print(f"{time.strftime('%H:%M:%S')} not written: {error}", flush=True)


def write(args: argparse.Namespace) -> None:
    """Writes the report once and says so in one line."""
    from mae_et.report.benchmark import make_benchmark  # after the command line is checked: these imports take seconds
    from mae_et.report.page import counts, write_report

    benchmark = make_benchmark(args.runs, args.baseline, args.filter, args.group_by)
    if args.filter and len(benchmark.left_out) == len(benchmark.runs):
        raise UserError(
            f"no run fulfils --filter {args.filter!r}: `facts` in the report.json of all runs shows keys and values"
        )
    is_new = write_report(benchmark, args.out, args.title, not args.no_pictures)
    page = args.out / "report.html"
    said = f"{page}: {counts(benchmark)}"
    if args.watch is not None:
        said = f"{time.strftime('%H:%M:%S')} {said if is_new else f'{page}: nothing new'}"
    print(said, flush=True)


if __name__ == "__main__":
    run_tool(main, make_parser())
