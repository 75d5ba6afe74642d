"""Whole runs with the replay buffer: how they go on after a stop or a kill, what must not change them, what they report."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_et.config.schema import PretrainConfig
from mae_et.data import replay
from mae_et.data.sources.spec import open_source
from mae_et.engine.distributed import World
from mae_et.errors import CheckpointError, StoppedEarly, UserError
from mae_et.lowfreq import crop_and_normalize
from mae_et.storage import checkpoint
from mae_et.storage.metrics_file import read_jsonl
from mae_et.tasks import pretrain
from mae_et.tasks.run import TaskData, run_training
from tests.conftest import Stop, killed_before, losses
from tests.integration.test_pretrain import run as run_plain
from tests.integration.test_pretrain import small_config, start_tool, wait_for_step
from tests.plans import plan_for

ROWS = [{"bandwidth": 16, "factor": 4, "size": 3}, {"bandwidth": 24, "factor": 2, "size": 2}]


def replay_config(mode: str = "mix", **overrides: Any) -> PretrainConfig:
    return small_config(replay__mode=mode, replay__stages=ROWS, **overrides)


def run(
    work_dir: Path, mode: str = "mix", resume: bool = False, task_type: type = pretrain.MAETask, **overrides: Any
) -> dict[str, Any]:
    return run_training(task_type, replay_config(mode, **overrides), work_dir, resume=resume, device="cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs by mode."""
    folder = tmp_path_factory.mktemp("runs")
    for mode in ("mix", "alternate"):
        run(folder / mode, mode)
    return {mode: folder / mode for mode in ("mix", "alternate")}


def run_in_two_parts(work_dir: Path, step: int, mode: str, **overrides: Any) -> dict[str, Any]:
    """Kills a run before a step and resumes it."""
    with pytest.raises(Stop):
        run(work_dir, mode, **overrides, task_type=killed_before(pretrain.MAETask, step))
    return run(work_dir, mode, resume=True, **overrides)


# Stages begin at steps 0, 10 and 19.
@pytest.mark.parametrize(
    ("mode", "step"), [("mix", 3), ("mix", 10), ("mix", 13), ("mix", 21), ("alternate", 7), ("alternate", 14)]
)
def test_resume__after_a_kill_has_equal_losses(finished: dict[str, Path], tmp_path: Path, mode: str, step: int) -> None:
    starts = [stage.first_step for stage in plan_for(replay_config(), 20).stages]
    assert starts == [0, 10, 19]
    summary = run_in_two_parts(tmp_path / "run", step, mode, run__save_interval=1)
    assert losses(tmp_path / "run") == losses(finished[mode])
    inside = step not in starts and step < starts[2]
    assert (summary["refilled_images"] > 0) == (summary["refill_seconds"] > 0) == inside


def test_resume__with_workers_and_accumulation(finished: dict[str, Path], tmp_path: Path) -> None:
    run_in_two_parts(tmp_path / "run", 14, "mix", run__save_interval=3, data__num_workers=2)
    assert losses(tmp_path / "run") == losses(finished["mix"])
    summary = run_in_two_parts(tmp_path / "micro", 15, "mix", run__save_interval=100, batch__micro_batch_size=2)
    assert summary["refilled_images"] == 0  # killed before the first save: from the start
    assert losses(tmp_path / "micro") == pytest.approx(losses(finished["mix"]), rel=1e-4)


def test_resume__says_that_it_refills(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="mae_et"):
        run_in_two_parts(tmp_path / "run", 5, "mix", run__save_interval=1)
    shown = [record.getMessage() for record in caplog.records if "replay buffer:" in record.getMessage()]
    assert shown[0] == "replay buffer: refilling after resume; 6 images of each process are prepared again"
    assert shown[1].startswith("replay buffer: refilled in ")


def test_resume__sigterm_while_refilling_loses_nothing(finished: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(tmp_path / "run", run__save_interval=1, task_type=killed_before(pretrain.MAETask, 5))
    original = replay.ReplayBuffer.insert

    def insert(self: Any, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay.ReplayBuffer, "insert", insert)
        with pytest.raises(StoppedEarly, match="stopped at step 5"):
            run(tmp_path / "run", resume=True, run__save_interval=1)
    run(tmp_path / "run", resume=True, run__save_interval=1)
    assert losses(tmp_path / "run") == losses(finished["mix"])


def test_resume__other_replay_is_refused_by_name(finished: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"replay\.mode: 'mix' -> 'alternate'"):
        run(finished["mix"], "alternate", resume=True)


def test_resume__checkpoints_from_before_the_buffer(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run_plain(tmp_path / "run", task_type=killed_before(pretrain.MAETask, 12))
    (path,) = checkpoint.list_checkpoints(tmp_path / "run/checkpoints")
    state = checkpoint.load_checkpoint(path)
    del state["config"]["replay"], state["progress"]["refilled_images"], state["progress"]["refill_seconds"]
    checkpoint.save_checkpoint(state, path.parent, 10, 2)
    assert run_plain(tmp_path / "run", resume=True)["status"] == "finished"


def test_pretrain__replay_off_is_the_run_without_it(tmp_path: Path) -> None:
    run(tmp_path / "off", "off")
    run_plain(tmp_path / "plain")
    assert losses(tmp_path / "off") == losses(tmp_path / "plain")


def test_pretrain__replay_changes_what_is_learnt(finished: dict[str, Path]) -> None:
    assert losses(finished["mix"]) != losses(finished["alternate"])


def test_pretrain__accumulation_leaves_losses_unchanged(finished: dict[str, Path], tmp_path: Path) -> None:
    run(tmp_path / "run", batch__micro_batch_size=2)
    assert losses(tmp_path / "run") == pytest.approx(losses(finished["mix"]), rel=1e-4)


def test_pretrain__a_mask_is_drawn_for_each_showing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = pretrain.place_noise, []

    def note(places: torch.Tensor, *args: int) -> torch.Tensor:
        seen.extend(places.tolist())
        return original(places, *args)

    monkeypatch.setattr(pretrain, "place_noise", note)
    run(tmp_path / "run")
    assert seen == list(range(plan_for(replay_config(), 20).num_images))


def test_pretrain__reports_the_load_reduction(finished: dict[str, Path]) -> None:
    plan = plan_for(replay_config(), 20)
    summary = json.loads((finished["mix"] / "summary.json").read_text())
    assert [stage["load_reduction"] for stage in summary["stages"]] == [4, 2, 1]
    assert [stage["num_fresh_images"] for stage in summary["stages"]] == [20, 36, 40]
    assert summary["num_images"] == plan.num_images == 192
    assert summary["load_reduction"] == 192 / 96
    assert (summary["refilled_images"], summary["refill_seconds"]) == (0, 0)
    lines = {line["step"]: line for line in read_jsonl(finished["mix"] / "metrics.jsonl") if "loss" in line}
    assert (lines[10]["shown_images"], lines[10]["fresh_images"]) == (80, 20)
    assert (lines[24]["shown_images"], lines[24]["fresh_images"]) == (192, 96)
    planned = json.loads((finished["mix"] / "plan.json").read_text())
    assert planned["stages"][0]["replay"] == {
        "mode": "mix", "factor": 4, "local_batch": 8, "loader_batch": 2, "buffer_images": 6, "buffer_bytes": 6 * 3 * 16**2,
    }  # fmt: skip


def test_pretrain__non_finite_dump_names_the_places_shown(tmp_path: Path) -> None:
    shown: list[list[int]] = []

    class Broken(pretrain.MAETask):
        def loss(self, model: Any, images: Any, batch: Any) -> Any:
            shown.append(batch.places.tolist())
            loss, extra = super().loss(model, images, batch)
            return (loss * float("nan") if len(shown) == 6 else loss), extra

    with pytest.raises(UserError, match="step 5"):
        run(tmp_path / "run", task_type=Broken)
    dump = json.loads((tmp_path / "run/nonfinite_step_00000005.json").read_text())
    assert dump["places_in_stream_of_main_process"] == shown[5]
    assert shown[5][:2] == [10, 11]  # fresh: 2 of 8 images at a step
    assert all(6 <= place < 12 for place in shown[5])


def test_pretrain__buffer_larger_than_memory_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mae_et.tasks.run.available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"replay buffers take .* GiB are free.*: lower the size in replay\.stages"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pretrain__two_processes_are_reproducible_and_resume(tmp_path: Path) -> None:
    options = {"curriculum__equivalent_epochs": 20.0, "run__save_interval": 1000, "batch__micro_batch_size": 2}
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    process = start_tool(replay_config(**options), tmp_path / "whole", num=2)
    shown = process.wait()
    assert process.returncode == 0, shown[-3000:]
    process = start_tool(replay_config(**options), tmp_path / "parts", num=2)
    wait_for_step(tmp_path / "parts/run", 30, process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    assert not (tmp_path / "parts/run/summary.json").exists()
    process = start_tool(replay_config(**options), tmp_path / "parts", "--resume", num=2)
    shown = process.wait()
    assert process.returncode == 0, shown[-3000:]
    assert losses(tmp_path / "parts/run") == losses(tmp_path / "whole/run")
    summary = json.loads((tmp_path / "whole/run/summary.json").read_text())
    assert [stage["load_reduction"] for stage in summary["stages"]] == [4, 2, 1]


@pytest.mark.parametrize("side", [16, 32])
def test_preprocess__overwrites_its_result_and_nothing_else(tmp_path: Path, side: int) -> None:
    config = replay_config()
    source = open_source(config.data.train)
    world = World(0, 1, 1, torch.device("cpu"))
    task = pretrain.MAETask(config, TaskData(source), plan_for(config, len(source)), world, tmp_path)
    first, second = torch.randint(0, 256, (2, 5, 3, side, side), dtype=torch.uint8)
    data = config.data
    expected = [crop_and_normalize(images, 16, data.mean, data.std, True) for images in (first, second, second[:3])]
    ours = task.preprocess(first, (16, 16))
    assert torch.equal(ours, expected[0])
    again = task.preprocess(second, (16, 16))
    assert torch.equal(again, expected[1])
    assert (again.data_ptr() == ours.data_ptr()) == (side == 16)
    assert torch.equal(task.preprocess(second[:3], (16, 16)), expected[2])
    assert torch.equal(again, expected[1])
