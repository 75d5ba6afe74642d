"""Runs with a budget in hours: measured and solved once, kept on resuming, the same in all processes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_et.commands.plan import main, make_parser
from mae_et.config.files import load_config
from mae_et.config.schema import ClassifyConfig, PretrainConfig, from_dict
from mae_et.engine import measure
from mae_et.engine.distributed import World
from mae_et.errors import CheckpointError, UserError
from mae_et.tasks import resolve
from mae_et.tasks.finetune import FinetuneTask
from mae_et.tasks.linear_probe import LinearProbeTask
from mae_et.tasks.pretrain import MAETask
from mae_et.tasks.run import run_training
from tests import processes
from tests.conftest import REPOSITORY, Stop, killed_before, losses, small_values
from tests.integration.test_collective import classify_config

WINDOW = 30.0  # seconds that each measured window seems to take, so that no test depends on the load of the machine
HOURS = 0.6
CONFIG = str(REPOSITORY / "tests" / "golden" / "configs" / "pretrain.py")
BUDGET = {"curriculum__budget_hours": HOURS, "run__save_interval": 10}


def seem_slow() -> None:
    def seconds(call: Callable[[], object], world: World | None = None) -> float:
        call()
        return WINDOW

    measure._seconds = seconds


@pytest.fixture(autouse=True)
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_seconds", measure._seconds)  # restored afterwards
    seem_slow()


SECONDS = measure._seconds  # the real one


def plan_json(work_dir: Path) -> dict[str, Any]:
    return json.loads((work_dir / "plan.json").read_text())


def pretrain(work_dir: Path, resume: bool = False, task_type: type = MAETask, **overrides: Any) -> dict[str, Any]:
    config = from_dict(PretrainConfig, small_values(**{**BUDGET, **overrides}))
    return run_training(task_type, config, work_dir, resume, "cpu")


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {
            "batch": {"global_batch_size": 8, "micro_batch_size": 4, "early_large_batch": {"rule": "area"}},
            "replay": {"mode": "alternate", "stages": [{"bandwidth": 16, "factor": 2, "size": 4}]},
            "data__num_workers": 1,
        },
    ],
)
def test_budget_hours__is_measured_and_written(overrides, tmp_path):
    pretrain(tmp_path / "run", **overrides)
    plan = plan_json(tmp_path / "run")
    resolved = plan["resolved"]
    found = resolved["measurement"]
    assert plan["equivalent_epochs"] == resolved["equivalent_epochs"] != 5.2
    assert plan["warmup_fraction"] == pytest.approx(1 / 5.2)
    assert (resolved["precision"], resolved["budget_hours"]) == ("fp32", HOURS)
    assert 0.7 * 3600 * HOURS < resolved["planned_seconds"] <= 3600 * HOURS
    assert plan["num_steps"] > 24
    assert [stage["bandwidth"] for stage in found["stages"]] == [16, 24, 32]
    assert all(stage[f"{kind}images_per_second"] > 0 for stage in found["stages"] for kind in ("", "loader_", "step_"))
    assert found["checkpoint_seconds"] > 0
    assert found["hook_seconds"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # the folder of the measurement is gone


def test_budget_hours__the_measurement_leaves_no_trace_in_the_losses(tmp_path):
    pretrain(tmp_path / "hours")
    plan = plan_json(tmp_path / "hours")
    epochs = plan["equivalent_epochs"]
    pretrain(
        tmp_path / "epochs",
        curriculum__budget_hours=None,
        curriculum__equivalent_epochs=epochs,
        curriculum__warmup_equivalent_epochs=epochs / 5.2,
    )
    assert losses(tmp_path / "hours") == losses(tmp_path / "epochs")


def test_budget_hours__a_resumed_run_keeps_its_plan(tmp_path, monkeypatch, caplog):
    work_dir = tmp_path / "run"
    with pytest.raises(Stop):
        pretrain(work_dir, task_type=stops_in_the_run(23))
    before = plan_json(work_dir)
    monkeypatch.setattr(resolve, "measure", None)  # a call of it fails
    with pytest.raises(CheckpointError, match=r"was started with curriculum.budget_hours = .*, not 2"):
        pretrain(work_dir, resume=True, curriculum__budget_hours=2.0)
    with pytest.raises(UserError, match="holds a run: continue it with --resume"):
        pretrain(work_dir)
    monkeypatch.setattr("mae_et.engine.precision.cpu_has_bf16", lambda: True)  # another machine
    with caplog.at_level(logging.WARNING):
        pretrain(work_dir, resume=True, run__precision="auto")
    assert "would be 'bf16' on this device; the run was started with 'fp32' and keeps it" in caplog.text
    assert plan_json(work_dir) == before
    assert max(losses(work_dir)) == before["num_steps"]


def test_auto__another_precision_is_refused(tmp_path):
    work_dir, epochs = tmp_path / "run", {"curriculum__budget_hours": None}
    with pytest.raises(Stop):
        pretrain(work_dir, task_type=killed_before(MAETask, 12), run__precision="auto", **epochs)
    with pytest.raises(CheckpointError, match=r"run.precision: 'fp32' -> 'bf16'"):
        pretrain(work_dir, resume=True, run__precision="bf16", **epochs)
    (work_dir / "plan.json").unlink()
    with pytest.raises(CheckpointError, match=r"plan.json does not hold the precision and the budget"):
        pretrain(work_dir, resume=True, run__precision="auto", **epochs)


def stops_in_the_run(step: int) -> type:
    """A task that ends without warning before a step of the run, not of its measurement."""

    class Stops(MAETask):
        def loss(self, model, images, batch):
            if self.work_dir.name == "run" and self.optimizer.param_groups[0]["lr"] > 0 and self.count >= step:
                raise Stop
            self.count += 1
            return super().loss(model, images, batch)

        count = 0

    return Stops


def test_budget_hours__too_few_hours_name_those_that_work(tmp_path):
    with pytest.raises(UserError, match=r"smallest budget that works here is .* hours"):
        pretrain(tmp_path / "run", curriculum__budget_hours=1e-5)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("protocol", "task_type"), [("finetune", FinetuneTask), ("linear_probe", LinearProbeTask)])
def test_budget_hours__classification(protocol, task_type, tmp_path):
    config = classify_config(protocol, "scenes:60@32,seed=3")
    curriculum = config.curriculum.model_copy(update={"budget_hours": HOURS})
    config = from_dict(ClassifyConfig, config.model_copy(update={"curriculum": curriculum}).model_dump())
    summary = run_training(task_type, config, tmp_path / "run", device="cpu")
    assert summary["top1"] >= 0
    assert plan_json(tmp_path / "run")["resolved"]["planned_seconds"] <= 3600 * HOURS


def test_time__is_that_of_the_slowest_process(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure, "_seconds", SECONDS)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    class Two(World):
        def gather(self, value: object) -> list:
            return [value, 1.5 * value]  # the other process takes half as long again

    calls = []

    def take() -> None:
        calls.append(now[0])
        now[0] += 10.0 if len(calls) <= 3 else 0.25  # the first calls are slow

    world = Two(0, 2, 2, torch.device("cpu"))
    assert measure._time(take, 30.0, world, first=3, unit=4) == pytest.approx(0.375)
    assert (len(calls) - 3) % 4 == 0
    assert math.isclose((len(calls) - 3) * 0.375, 30.0, rel_tol=0.05)


def work(folder: Path) -> None:
    seem_slow()
    pretrain(folder / "run", curriculum__budget_hours=HOURS)


def test_budget_hours__all_processes_agree(tmp_path):
    ended = processes.run(partial(work, tmp_path), 2, tmp_path / "output")
    assert [code for code, _ in ended] == [0, 0], ended
    plan = plan_json(tmp_path / "run")
    assert plan["world_size"] == plan["resolved"]["measurement"]["num_processes"] == 2
    assert max(losses(tmp_path / "run")) == plan["num_steps"]


@pytest.mark.parametrize("options", [["--measure"], ["--hours", str(HOURS)]])
def test_plan__prints_speeds_and_limits(options, capsys):
    main(make_parser().parse_args([CONFIG, *options, "--device", "cpu"]))
    text = capsys.readouterr().out
    assert "loader alone" in text
    assert text.count("one process loads and trains in turn") == len(from_file().stages)


def test_plan__of_hours_has_the_epochs_that_fit(capsys):
    main(make_parser().parse_args([CONFIG, "--hours", str(HOURS), "--json"]))
    plan = json.loads(capsys.readouterr().out)
    assert plan["equivalent_epochs"] != from_file().equivalent_epochs
    assert len(plan["measurement"]["stages"]) == len(plan["limits"])


def test_plan__options_that_do_not_go_with_a_measurement():
    with pytest.raises(UserError, match="--world-size does not go with a measurement"):
        main(make_parser().parse_args([CONFIG, "--measure", "--world-size", "2"]))


def from_file() -> Any:
    return load_config(PretrainConfig, CONFIG, {}).curriculum
