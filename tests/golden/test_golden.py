"""Golden losses: tiny runs whose loss at each step is committed in losses.json, so that a change of them is seen.

A refactoring must not move any of these numbers. The tests see a run from outside alone: a config file in configs/, a tool
with its options, and the run folder that it writes. So they hold while modules move.

One list of losses holds for one batch of 8 images and for micro batches of 2 that are accumulated: order, augmentation and
mask of an image follow from (seed, place in the stream) alone. Batch-wise draws (drop path, mixup, cutmix, erasing) and the
probe's batch normalisation depend on the micro batch, so fine-tuning and probe have their list for one micro batch.

Tolerance. The numbers are float32 sums, and the order of a sum depends on the CPU and the number of threads. Measured with
torch 2.11 on an AMD EPYC with AVX-512, against the defaults on one thread, over all runs and steps: the instruction sets
default and avx2 of ATen (ATEN_CPU_CAPABILITY), SSE41 and AVX2 of oneDNN (ONEDNN_MAX_CPU_ISA), COMPATIBLE and AVX2 of MKL
(MKL_CBWR), NumPy without AVX2 and AVX-512 (NPY_DISABLE_CPU_FEATURES), each alone and all of them together, and two threads.
Mostly, the largest relative deviation is 2.5e-7 of a loss and 4.2e-7 of a norm of the gradient. Where rounding moves a pixel
by one of its 256 levels, it is more: in the replay buffer, which holds uint8 images (loss 2.1e-6, norm 1.2e-5), and in a
generated scene (loss 1.7e-6, norm 3.6e-6). No accuracy moved. TOLERANCES are 4 to 5 times the largest deviations.

Power. A learning rate that is 1.001 times as large moves a loss of each training run by 2.4e-5 (fine-tuning) to 8e-4 (HOG).
Weight decay on biases moves one by 7e-5 or more; the decay of the configs is so large for that purpose. The published crop
instead of the centred one moves the first loss of each pre-training by 1e-3 or more.
Another version of torch, torchvision, timm, NumPy or Pillow may draw or round otherwise: then all numbers may move.

To rewrite losses.json: `MAE_ET_WRITE_GOLDEN=1 python -m pytest tests/golden -n0`. A commit that moves a number must say why
in CHANGELOG.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import load_tool

FOLDER = Path(__file__).resolve().parent
GOLDEN = FOLDER / "losses.json"
WRITES = os.environ.get("MAE_ET_WRITE_GOLDEN") == "1"
TOLERANCES = {"loss": 1e-5, "grad_norm": 5e-5, "val/loss": 1e-5}  # relative
ONE_IMAGE = 0.01  # of the 100 validation images: a tie may fall either way

Numbers = dict[str, list[float]]


class Run(NamedTuple):
    """A run of a tool.

    Attributes:
        tool: a script in tools/.
        config: a file in configs/.
        options: for --cfg-options.
    """

    tool: str
    config: str
    options: tuple[str, ...] = ()


RUNS = {
    "pretrain": Run("pretrain", "pretrain"),
    "raw_pixels": Run("pretrain", "pretrain", ("model.norm_pix_loss=False",)),
    "hog": Run("pretrain", "pretrain", ("model.target=hog",)),
    "replay_mix": Run("pretrain", "replay"),
    "replay_alternate": Run("pretrain", "replay", ("replay.mode=alternate",)),
    "finetune": Run("classify", "finetune"),
    "linear_probe": Run("classify", "linear_probe"),
    "knn": Run("classify", "knn"),
}
ACCUMULATED = Run("pretrain", "pretrain", ("batch.micro_batch_size=2",))  # has the losses of "pretrain"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run "pretrain", whose backbone is classified with."""
    work_dir = tmp_path_factory.mktemp("golden") / "pretrain"
    start(RUNS["pretrain"], work_dir)
    return work_dir


def test_golden__pretrain(pretrained: Path) -> None:
    check("pretrain", read_numbers(pretrained))


def test_golden__accumulation_has_the_same_losses(tmp_path: Path) -> None:
    compare("pretrain", start(ACCUMULATED, tmp_path / "run"))


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.tool == "pretrain" and name != "pretrain"])
def test_golden__pretrain_variants(name: str, tmp_path: Path) -> None:
    check(name, start(RUNS[name], tmp_path / "run"))


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.tool == "classify"])
def test_golden__classify(name: str, pretrained: Path, tmp_path: Path) -> None:
    check(name, start(RUNS[name], tmp_path / "run", pretrained / "backbone.safetensors"))


def test_golden__each_run_has_an_entry() -> None:
    assert set(read_golden()) == set(RUNS)


def start(run: Run, work_dir: Path, backbone: Path | None = None) -> Numbers:
    """Runs a tool in this process.

    Args:
        run: what to run.
        work_dir: the run's folder; must not exist.
        backbone: a backbone file, for tools/classify.py.
    Returns:
        The run's numbers, as in losses.json.
    """
    tool = load_tool(run.tool)
    command = [str(FOLDER / "configs" / f"{run.config}.py"), "--work-dir", str(work_dir), "--device", "cpu"]
    if backbone is not None:
        command += ["--backbone", str(backbone)]
    if run.options:
        command += ["--cfg-options", *run.options]
    tool.main(tool.make_parser().parse_args(command))
    return read_numbers(work_dir)


def read_numbers(work_dir: Path) -> Numbers:
    """Reads what a run folder holds of losses, norms of the gradient and accuracies."""
    numbers: Numbers = {}
    metrics = work_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    for name in ("loss", "grad_norm", "val/loss"):
        if values := [line[name] for line in lines if name in line]:
            numbers[name] = values
    summary: dict[str, Any] = json.loads((work_dir / "summary.json").read_text())
    if "top1" in summary:
        numbers["top1"] = list(summary["top1_by_k"].values()) if "top1_by_k" in summary else [summary["top1"]]
    return numbers


def check(name: str, numbers: Numbers) -> None:
    """Compares a run with its entry, which it writes first where MAE_ET_WRITE_GOLDEN=1 asks for it."""
    if WRITES:
        if "PYTEST_XDIST_WORKER" in os.environ:
            pytest.fail("several processes would write losses.json at once: run pytest with -n0")
        known = {**read_golden(), name: numbers}
        write_golden({name: known[name] for name in RUNS if name in known})
    compare(name, numbers)


def compare(name: str, numbers: Numbers) -> None:
    """Fails with the first step and the largest deviation of each list that differs from the entry."""
    expected = read_golden()[name]
    assert {key: len(values) for key, values in numbers.items()} == {key: len(v) for key, v in expected.items()}
    faults = []
    for key, values in numbers.items():
        deviations = [
            abs(ours - theirs) if key == "top1" else abs(ours - theirs) / abs(theirs)
            for ours, theirs in zip(values, expected[key], strict=True)
        ]
        most = ONE_IMAGE * 1.001 if key == "top1" else TOLERANCES[key]
        bad = [i for i, deviation in enumerate(deviations) if not deviation <= most]
        if bad:
            first = bad[0]
            faults.append(
                f"{key}: {len(bad)} of {len(values)} differ, the largest deviation is {max(deviations):.2g} (allowed: "
                f"{most:g}); first at index {first}: {values[first]!r}, expected {expected[key][first]!r}"
            )
    assert not faults, "\n".join([f"the run {name!r} has other numbers than losses.json", *faults])


def read_golden() -> dict[str, Numbers]:
    """Reads losses.json; empty where there is none yet."""
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def write_golden(golden: dict[str, Numbers]) -> None:
    """Writes losses.json with one line for each list."""
    runs = []
    for name, numbers in golden.items():
        lists = ",\n".join(f"    {json.dumps(key)}: {json.dumps(values)}" for key, values in numbers.items())
        runs.append(f"  {json.dumps(name)}: {{\n{lists}\n  }}")
    GOLDEN.write_text("{\n" + ",\n".join(runs) + "\n}\n")
