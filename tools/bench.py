"""Times what this project does against plain references, paired in one process.

The references are written out in benches/, one file for each benchmark.
`python tools/bench.py WHAT [--threads N] [--rounds N] [--json FILE]`
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import _checkout  # noqa: F401
import torch
from benches.attention import bench_attention
from benches.extract import bench_extract
from benches.finetune import bench_finetune
from benches.gpu import add_gpu_options, bench_gpu
from benches.large import add_large_options, bench_large
from benches.loader import add_loader_options, bench_loader
from benches.loop import add_loop_options, bench_loop
from benches.lowfreq import bench_lowfreq
from benches.measuring import Comparison, describe_machine, table
from benches.raw import add_raw_options, bench_raw
from benches.replay import bench_replay
from benches.sdpa import bench_sdpa
from benches.step import bench_precision, bench_stages, bench_step
from benches.supervised import bench_supervised
from benches.transfer import bench_transfer
from benches.whole import add_whole_options, bench_whole

from mae_et.cli import run_tool
from mae_et.errors import UserError


class Bench(NamedTuple):
    """A subcommand."""

    run: Callable[[argparse.Namespace], list[Comparison]]
    rounds: int  # that are measured unless the user says otherwise
    help: str
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None


BENCHES = {
    "lowfreq": Bench(lambda args: bench_lowfreq(args.rounds), 15, "the low-frequency crop"),
    "step": Bench(lambda args: bench_step(args.rounds), 9, "one pre-training step with the same loss"),
    "precision": Bench(
        lambda args: bench_precision(args.rounds), 3, "the pre-training step of ViT-base in fp32 and bf16"
    ),
    "gpu": Bench(bench_gpu, 5, "the bf16 pre-training step on a GPU, eager and compiled", add_gpu_options),
    "sdpa": Bench(lambda args: bench_sdpa(args.rounds), 5, "fused and explicit attention"),
    "stages": Bench(lambda args: bench_stages(args.rounds), 7, "images/s at smaller bandwidths"),
    "replay": Bench(lambda args: bench_replay(args.rounds), 15, "a replayed batch against the half-precision list"),
    "loader": Bench(bench_loader, 5, "the loader, from JPEG files to normalised batches", add_loader_options),
    "raw": Bench(bench_raw, 5, "the loader from raw shards, and their fidelity", add_raw_options),
    "loop": Bench(bench_loop, 3, "the training loop at 96 px in one process, files, replay and step", add_loop_options),
    "whole": Bench(bench_whole, 2, "whole pre-training runs where loading is the limit", add_whole_options),
    "finetune": Bench(lambda args: bench_finetune(args.rounds), 5, "whole loops, ours and timm's, files and loaders"),
    "supervised": Bench(
        lambda args: bench_supervised(args.rounds),
        3,
        "supervised loops against timm's, and each backbone at smaller sizes",
    ),
    "extract": Bench(lambda args: bench_extract(args.rounds), 5, "tools/extract.py against the forward pass alone"),
    "attention": Bench(
        lambda args: bench_attention(args.rounds), 5, "attention with relative positions, its memory too"
    ),
    "large": Bench(bench_large, 3, "growth with the size of a data set, up to 14.2 million images", add_large_options),
    "transfer": Bench(lambda args: bench_transfer(args.rounds), 2, "an iteration of detection and of segmentation"),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time what this project does against plain references, alternating in one process.",
        epilog="example: python tools/bench.py step --threads 2 --json benchmarks/step.json; trust ratios to 10%%",
    )
    whats = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, bench in BENCHES.items():
        what = whats.add_parser(name, help=bench.help, description=f"Times {bench.help}.")
        what.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads; default: 1")
        what.add_argument(
            "--rounds", type=int, default=bench.rounds, metavar="N", help="measured rounds; default: %(default)s"
        )
        what.add_argument("--json", type=Path, metavar="FILE", help="write the raw times, e.g. benchmarks/NAME.json")
        bench.add_options(what)
    return parser


def main(args: argparse.Namespace) -> None:
    if args.threads < 1 or args.rounds < 1:
        raise UserError("--threads and --rounds must be at least 1")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"no such folder: {args.json.parent}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    comparisons = BENCHES[args.what].run(args)
    print(table(comparisons))
    if args.json:
        record = {
            "what": args.what,
            "command": shlex.join(["python", "tools/bench.py", *sys.argv[1:]]),
            "machine": machine,
            "load_at_end": os.getloadavg(),
            "comparisons": comparisons,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written: {args.json}")


if __name__ == "__main__":
    run_tool(main, make_parser())
