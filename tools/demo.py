"""Runs every part of the project on generated scenes: `python tools/demo.py [--only NAME ...] [--work-dir DIR]`.

Pre-trains with and without the curriculum at equal cost, compares the features, fine-tunes for detection and segmentation,
and writes the report. Finished steps are not repeated.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401

from mae_et.cli import run_tool
from mae_et.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("detection", "segmentation")
NEEDS_MM = {*TASKS, "doctor", "data_coco", "data_ade20k"}


@dataclass(frozen=True)
class Step:
    """One command; `done` is the file that it writes last. In both, `{demo}` stands for the demo's folder."""

    name: str
    command: str
    done: str
    is_shown: bool = False  # False: its output goes to a file


def _pretrain(preset: str, is_shown: bool) -> Step:
    command = f"tools/pretrain.py configs/pretrain/demo.py --work-dir {{demo}}/{preset} --cfg-options curriculum.preset={preset}"
    return Step(f"pretrain_{preset}", command, f"{{demo}}/{preset}/summary.json", is_shown)


def _classify(protocol: str, run: str) -> Step:
    command = (
        f"tools/classify.py configs/classification/demo_{protocol}.py --backbone {{demo}}/{run}/backbone.safetensors "
        f"--work-dir {{demo}}/{protocol}_{run}"
    )
    return Step(f"{protocol}_{run}", command, f"{{demo}}/{protocol}_{run}/summary.json")


def _data(layout: str) -> Step:
    command = (
        f"tools/make_demo_data.py {{demo}}/{layout} --layout {layout} --num-train 400 --num-val 60 --image-size 128"
    )
    last = {"coco": "annotations/instances_val2017.json", "ade20k": "classes.json"}[layout]
    return Step(f"data_{layout}", f"{command} --overwrite", f"{{demo}}/{layout}/{last}")


def _transfer(task: str) -> Step:
    command = f"tools/train.py configs/{task}/demo.py --backbone {{demo}}/etpp/backbone.safetensors --work-dir {{demo}}/{task}"
    return Step(task, command, f"{{demo}}/{task}/summary.json")


# The steps of a row run side by side, one thread each.
JOURNEY = (
    ("pre-training under the curriculum", [_pretrain("etpp", is_shown=True)]),
    ("pre-training at full size at the same cost, for comparison", [_pretrain("constant", is_shown=False)]),
    ("kNN on the features of both", [_classify("knn", "etpp"), _classify("knn", "constant")]),
    ("linear probe on both", [_classify("linear", "etpp"), _classify("linear", "constant")]),
    ("scenes with boxes, masks and labels", [_data("coco"), _data("ade20k")]),
    (
        "check that all backbone classes compute the same features",
        [Step("doctor", "tools/doctor.py {demo}/etpp/backbone.safetensors", "")],
    ),
    ("detection and segmentation from the backbone of the curriculum", [_transfer(task) for task in TASKS]),
    ("report", [Step("report", "tools/report.py {demo} --out {demo}/report", "", is_shown=True)]),
)
NAMES = [step.name for _, steps in JOURNEY for step in steps]
COMPARED = [f"{prefix}{preset}" for prefix in ("", "knn_", "linear_") for preset in ("etpp", "constant")]  # run folders


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(
            "Pre-train with and without the curriculum, compare the features, detect, segment and report, on generated scenes. "
            "Takes about eight minutes on two CPU cores."
        ),
        epilog="Detection and segmentation need the packages that `make env-mm` installs. Without them these steps are skipped.",
    )
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/demo"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    return parser


def main(args: argparse.Namespace) -> None:
    demo = args.work_dir.resolve()
    asked = set(args.only or NAMES)
    if not args.only and importlib.util.find_spec("mmdet") is None:
        print("Detection and segmentation are skipped because mmdet is not installed. To install it, run: make env-mm")
        asked -= NEEDS_MM
    start = time.monotonic()
    for title, steps in JOURNEY:
        todo = [step for step in steps if step.name in asked and not (step.done and _path(step.done, demo).is_file())]
        if not todo:
            continue
        minutes = (time.monotonic() - start) / 60
        print(f"\n=== {minutes:.1f} min: {title}", flush=True)
        run_together(todo, demo)
    if asked & {"linear_etpp", "linear_constant"} and all(
        (demo / name / "summary.json").is_file() for name in COMPARED
    ):
        print("", *compare(demo), sep="\n")
    print(f"\nTotal time: {(time.monotonic() - start) / 60:.1f} min. All results are in {args.work_dir}")
    if "report" in asked:
        print(f"Report: {args.work_dir / 'report' / 'report.html'}")


def compare(demo: Path) -> list[str]:
    """Compares the two pre-trainings at equal cost, from their summaries.

    Args:
        demo: the demo's folder, where both are pre-trained and evaluated by kNN and linear probe.
    Returns:
        The lines to print.
    """

    def read(name: str) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((demo / name / "summary.json").read_text())
        return summary

    def row(name: str, etpp: str, constant: str, note: str = "") -> str:
        return f"  {name:<32}{etpp:>10}{constant:>10}  {note}".rstrip()

    runs = [read(preset) for preset in ("etpp", "constant")]
    lines = ["Curriculum (etpp) against training at full size (constant), at equal cost:", row("", "etpp", "constant")]
    for name, key, form in (
        ("compute, equivalent epochs", "equivalent_epochs", ".2f"),
        ("compute, training TFLOP", "train_petaflops", ".2f"),
        ("images shown", "num_images", ",d"),
        ("training time, s", "seconds", ".0f"),
    ):
        scale = 1000 if key == "train_petaflops" else 1
        lines.append(row(name, *(format(scale * run[key], form) for run in runs)))
    for protocol, name in (("knn", "kNN accuracy, %"), ("linear", "linear probe accuracy, %")):
        etpp, constant = (read(f"{protocol}_{preset}") for preset in ("etpp", "constant"))
        # As for two independent samples. Both are evaluated on the same images, so the true error is usually smaller.
        error = math.sqrt(sum(it["top1"] * (1 - it["top1"]) / it["num_val"] for it in (etpp, constant)))
        difference = 100 * (etpp["top1"] - constant["top1"])
        note = f"difference {difference:+.1f}, standard error {100 * error:.1f}"
        lines.append(row(name, f"{100 * etpp['top1']:.1f}", f"{100 * constant['top1']:.1f}", note))
    return [
        *lines,
        "The standard errors cover the choice of validation images only. One seed cannot show how much the accuracy varies "
        "between seeds; results/2026-11-25_demo_2cores/README.md compares three seeds.",
    ]


def run_together(steps: list[Step], demo: Path) -> None:
    """Runs commands side by side and waits for all of them.

    Raises:
        UserError: if one fails; the last lines of its output are printed before.
    """
    (demo / "logs").mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "MAE_ET_DEMO_COCO": str(demo / "coco"),
        "MAE_ET_DEMO_ADE": str(demo / "ade20k"),
        "PYTHONUNBUFFERED": "1",
        **({"OMP_NUM_THREADS": "1"} if len(steps) > 1 else {}),
    }
    with contextlib.ExitStack() as stack:
        running = []
        for step in steps:
            words = [sys.executable, *shlex.split(step.command.replace("{demo}", shlex.quote(str(demo))))]
            if "--work-dir" in words and _path(step.done, demo).parent.is_dir():
                words.append("--resume")  # an earlier demo was stopped in this step
            print("python " + " ".join(words[1:]), flush=True)
            output = None if step.is_shown else stack.enter_context(open(demo / "logs" / f"{step.name}.log", "w"))
            process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=output, stderr=output)
            stack.callback(process.terminate)  # no effect on a finished process
            running.append((step, process))
        failed = [step for step, process in running if process.wait() != 0]
    for step in steps:
        if not step.is_shown:
            text = (demo / "logs" / f"{step.name}.log").read_text(errors="replace")
            lines = [line for line in text.splitlines() if line.strip()]
            print(f"{step.name}:", *lines[-20 if step in failed else -3 :], sep="\n  ")
    if failed:
        raise UserError(
            f"{', '.join(step.name for step in failed)} failed. The logs are in {demo / 'logs'}. After the fix, run the same "
            "command again: finished steps are not repeated"
        )


def _path(pattern: str, demo: Path) -> Path:
    return Path(pattern.replace("{demo}", str(demo)))


if __name__ == "__main__":
    run_tool(main, make_parser())
