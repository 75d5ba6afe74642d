"""The whole journey on generated scenes, on two CPU cores: `python tools/demo.py [--only NAME ...] [--work-dir DIR]`.

Pre-trains with and without the curriculum, judges the features, fine-tunes for detection and segmentation, and writes the
report. What is finished is not repeated.
"""

import argparse
import contextlib
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import _checkout  # noqa: F401

from mae_et.cli import run_tool
from mae_et.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("detection", "segmentation")
NEEDS_MM = {*TASKS, "doctor", "data_coco", "data_ade20k"}


@dataclass(frozen=True)
class Step:
    """One command; `done` is the file that it writes last. `{demo}` in both is the demo's folder."""

    name: str
    command: str
    done: str
    is_shown: bool = False  # else its output goes to a file


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
    ("pre-training at full size, for comparison", [_pretrain("constant", is_shown=False)]),
    ("kNN on the features of both", [_classify("knn", "etpp"), _classify("knn", "constant")]),
    ("linear probe on both", [_classify("linear", "etpp"), _classify("linear", "constant")]),
    ("scenes with boxes, masks and labels", [_data("coco"), _data("ade20k")]),
    (
        "proof that all classes read the same features",
        [Step("doctor", "tools/doctor.py {demo}/etpp/backbone.safetensors", "")],
    ),
    ("detection and segmentation from the first backbone", [_transfer(task) for task in TASKS]),
    ("report", [Step("report", "tools/report.py {demo} --out {demo}/report", "", is_shown=True)]),
)
NAMES = [step.name for _, steps in JOURNEY for step in steps]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Pre-train, judge, detect, segment and report on generated scenes; about ten minutes on two CPU cores.",
        epilog="detection and segmentation need the packages of requirements-mm.txt (make env-mm) and are left out without",
    )
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/demo"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    return parser


def main(args: argparse.Namespace) -> None:
    demo = args.work_dir.resolve()
    asked = set(args.only or NAMES)
    if not args.only and importlib.util.find_spec("mmdet") is None:
        print("detection and segmentation are left out: `make env-mm` installs what they need")
        asked -= NEEDS_MM
    start = time.monotonic()
    for title, steps in JOURNEY:
        todo = [step for step in steps if step.name in asked and not (step.done and _path(step.done, demo).is_file())]
        if not todo:
            continue
        minutes = (time.monotonic() - start) / 60
        print(f"\n=== {minutes:.1f} min: {title}", flush=True)
        run_together(todo, demo)
    print(f"\n{(time.monotonic() - start) / 60:.1f} min in all; everything is in {args.work_dir}")
    if "report" in asked:
        print(f"report: {args.work_dir / 'report' / 'report.html'}")


def run_together(steps: list[Step], demo: Path) -> None:
    """Runs commands side by side and waits for all of them.

    Raises:
        UserError: if one fails, with the end of what it said.
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
                words.append("--resume")  # it was stopped on the way
            print("python " + " ".join(words[1:]), flush=True)
            output = None if step.is_shown else stack.enter_context(open(demo / "logs" / f"{step.name}.log", "w"))
            process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=output, stderr=output)
            stack.callback(process.terminate)  # does nothing to one that has ended
            running.append((step, process))
        failed = [step for step, process in running if process.wait() != 0]
    for step in steps:
        if not step.is_shown:
            text = (demo / "logs" / f"{step.name}.log").read_text(errors="replace")
            lines = [line for line in text.splitlines() if line.strip()]
            print(f"{step.name}:", *lines[-20 if step in failed else -3 :], sep="\n  ")
    if failed:
        raise UserError(
            f"{', '.join(step.name for step in failed)} failed; run the same command to continue with the rest. "
            f"Logs are in {demo / 'logs'}"
        )


def _path(pattern: str, demo: Path) -> Path:
    return Path(pattern.replace("{demo}", str(demo)))


if __name__ == "__main__":
    run_tool(main, make_parser())
