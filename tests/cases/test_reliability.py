"""Runs that meet signals, lost processes, damaged logs and bare containers."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_et.config.files import save_config
from mae_et.config.schema import ClassifyConfig, from_dict
from mae_et.engine.distributed import World
from mae_et.errors import CheckpointError, NonFiniteError, StoppedEarly, UserError
from mae_et.runs.folder import RunFolder
from mae_et.storage.checkpoint import list_checkpoints
from mae_et.storage.metrics_file import MetricsFile, read_jsonl
from mae_et.tasks.finetune import FinetuneTask
from mae_et.tasks.linear_probe import LinearProbeTask
from mae_et.tasks.pretrain import MAETask
from mae_et.tasks.run import TrainingTask, run_training
from tests.conftest import REPOSITORY, changing_loss, losses
from tests.integration.test_pretrain import run, small_config, start_tool, wait_for_step

TOOL = [sys.executable, "tools/pretrain.py"]


@contextlib.contextmanager
def caplog_level() -> Iterator[None]:
    """Logs at INFO, as the tools do."""
    logger = logging.getLogger("mae_et")
    before = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before)


def signalled_at(task_type: type[TrainingTask], number: int, which: signal.Signals) -> type:
    """Returns a task that gets a signal in a micro batch of this process."""

    def change(batch: int, loss: torch.Tensor) -> torch.Tensor:
        if batch == number:
            os.kill(os.getpid(), which)
        return loss

    return changing_loss(task_type, change)


def probe_config(protocol: str, **regularization: float) -> ClassifyConfig:
    values: dict[str, Any] = {
        "protocol": protocol,
        "data": {
            "train": "scenes:20@32,seed=3", "val": "scenes:10@32,seed=3,first=100", "image_size": 32, "num_workers": 0,
        },
        "model": {"size": "tiny", "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
        "curriculum": {
            "preset": "constant", "equivalent_epochs": 4, "baseline_equivalent_epochs": 4, "warmup_equivalent_epochs": 1,
        },
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
        "run": {"log_interval": 1, "precision": "fp32"},
    }  # fmt: skip
    return from_dict(ClassifyConfig, values)


# -------------------------------------------------------------------- signals


def test_case__C10_a_stop_takes_effect_between_micro_batches(tmp_path: Path) -> None:
    """16 px hold all 8 images at once, 32 px two: step 14 has four micro batches, and the second one is interrupted."""
    run(tmp_path / "whole", batch__micro_batch_size=2)
    plan = json.loads((tmp_path / "whole/plan.json").read_text())
    before = sum(stage["num_steps"] * stage["accum_steps"] for stage in plan["stages"][:2])
    first = plan["stages"][2]["first_step"]
    task = signalled_at(MAETask, before + 1, signal.SIGTERM)
    with pytest.raises(StoppedEarly, match=f"stopped at step {first} "):
        run(tmp_path / "run", task_type=task, batch__micro_batch_size=2, run__save_interval=1000)
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == [f"step_{first:08d}.pt"]
    run(tmp_path / "run", resume=True, batch__micro_batch_size=2, run__save_interval=1000)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_case__C10_an_interrupted_step_leaves_no_trace_in_the_statistics(tmp_path: Path) -> None:
    """The BatchNorm of the probe saw the micro batches of the step that was given up."""
    config = probe_config("linear_probe")
    run_training(LinearProbeTask, config, tmp_path / "whole", device="cpu")
    with pytest.raises(StoppedEarly):
        run_training(signalled_at(LinearProbeTask, 14, signal.SIGTERM), config, tmp_path / "run", device="cpu")
    run_training(LinearProbeTask, config, tmp_path / "run", resume=True, device="cpu")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    kept = [torch.load(list_checkpoints(tmp_path / name / "checkpoints")[-1])["model"] for name in ("run", "whole")]
    assert torch.equal(kept[0]["norm.running_mean"], kept[1]["norm.running_mean"])


@pytest.mark.parametrize("which", ["SIGHUP", "SIGTERM", "SIGINT"])
def test_case__F13_each_stop_signal_saves(tmp_path: Path, which: str) -> None:
    with pytest.raises(StoppedEarly, match="--resume"):
        run(tmp_path, task_type=signalled_at(MAETask, 3, signal.Signals[which]))
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000004.pt"]


# -------------------------------------------------------------------- other processes


def test_case__F4_a_killed_loader_process_is_named(tmp_path: Path) -> None:
    def change(number: int, loss: torch.Tensor) -> torch.Tensor:
        if number == 3:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(0.5)  # the handler of SIGCHLD raises here or later
        return loss

    with pytest.raises(UserError, match=r"a loader process died.*data\.num_workers"):
        run(tmp_path, task_type=changing_loss(MAETask, change), data__num_workers=1, run__save_interval=1)


def test_case__F13b_a_lost_process_is_one_message(tmp_path: Path) -> None:
    config = small_config(batch__micro_batch_size=4, curriculum__equivalent_epochs=400.0)
    process = start_tool(config, tmp_path, num=2)
    wait_for_step(tmp_path / "run", 5, process)
    os.kill(process.pids[1], signal.SIGKILL)
    said = process.wait(timeout=120)
    assert process.returncode != 0
    assert "lost contact with another training process" in said
    assert "Traceback" not in said, said[-3000:]


def test_case__M12_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    config, world = small_config(), World(0, 1, 1, torch.device("cpu"))
    with (
        RunFolder(tmp_path, config, world),
        pytest.raises(UserError, match=r"another run is writing into .*--work-dir"),
    ):
        run(tmp_path, resume=True)
    run(tmp_path, resume=True)  # the lock is free again


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT not set"),
    ],
)
def test_case__C6_incomplete_variables_of_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        run(tmp_path)


# -------------------------------------------------------------------- logs and numbers


@pytest.mark.parametrize(
    "damage",
    [b"\xff\xfe\n", b"[1, 2]\n", b'{"loss": 1.0}\n', b"null\n", b'{"step": "3"}\n', b"{" * 5000 + b"\n", b"\n"],
    ids=["not-utf-8", "list", "no-step", "null", "step-is-text", "deep", "empty"],
)
def test_case__F7_damaged_metrics_are_set_aside(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + damage + b'{"step": 2, "loss": 1.0}\n')
    before = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        MetricsFile(path, first_step=2).close()
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]
    assert (tmp_path / "metrics.damaged-1.jsonl").read_bytes() == before
    assert "1 lines are damaged" in caplog.text
    MetricsFile(path, first_step=2).close()
    assert not (tmp_path / "metrics.damaged-2.jsonl").exists()


def test_case__F7_a_line_cut_off_by_a_kill_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    MetricsFile(path, first_step=2).close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("task_type", [MAETask, FinetuneTask])
def test_case__F13c_a_run_without_a_finite_step_fails(tmp_path: Path, task_type: type) -> None:
    broken = changing_loss(task_type, lambda number, loss: loss * float("nan"))
    config = small_config(run__max_skipped_steps=1000) if task_type is MAETask else probe_config("finetune")
    with pytest.raises(NonFiniteError, match=r"all 24 steps|at step 0"):
        run_training(broken, config, tmp_path, device="cpu")
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert not (tmp_path / "summary.json").exists()


# -------------------------------------------------------------------- environments


@pytest.mark.skipif(os.getuid() != 0, reason="changes the user id")
def test_case__F3_a_user_without_a_passwd_entry(tmp_path: Path) -> None:
    save_config(small_config(), tmp_path / "small.py", "A test.")
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents[:-2]:  # up to, not including, the temporary folder of the system
        folder.chmod(folder.stat().st_mode | 0o005)
    bare = {key: value for key, value in os.environ.items() if key not in ("USER", "LOGNAME", "HOME")}
    command = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", *TOOL, tmp_path / "small.py"]
    command += ["--work-dir", tmp_path / "run", "--device", "cpu"]
    done = subprocess.run(command, cwd=REPOSITORY, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_case__OMP_the_library_leaves_the_process_alone() -> None:
    code = "import os, mae_et.tasks.pretrain; assert 'OMP_WAIT_POLICY' not in os.environ"
    bare = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=bare, check=True)


# -------------------------------------------------------------------- resuming


def test_resume__replay_with_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    """Each process has a replay buffer of its own, so another number of processes would be another run."""
    rows = [{"bandwidth": 16, "factor": 4, "size": 3}]
    config = small_config(replay__mode="mix", replay__stages=rows, curriculum__equivalent_epochs=20.0)
    run_training(MAETask, config, tmp_path / "run", device="cpu")
    process = start_tool(config, tmp_path, "--resume", num=2)
    said = process.wait(timeout=120)
    assert process.returncode != 0
    assert "processes and micro batches" in said
    with pytest.raises(CheckpointError):
        run_training(FinetuneTask, probe_config("finetune"), tmp_path / "run", resume=True, device="cpu")


def test_case__C11_resume_starts_a_run_that_has_no_checkpoint(tmp_path: Path) -> None:
    """So that one command serves the first start and each restart."""
    first = run(tmp_path / "new", resume=True)
    again = run(tmp_path / "new", resume=True)
    assert first["num_steps"] == again["num_steps"] == len(losses(tmp_path / "new"))


def test_case__F16_tests_work_where_the_shell_ignores_sigint() -> None:
    """As a non-interactive shell does for what it starts in the background; see tests/conftest.py."""
    code = "import signal, tests.conftest; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    command = ["sh", "-c", f"trap '' INT; exec {sys.executable} -c '{code}'"]
    subprocess.run(command, cwd=REPOSITORY, check=True)


def test_case__M8_the_log_file_shows_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_et.engine.train_log.SECONDS_BETWEEN_LINES", 0.0)
    with caplog_level():
        run(tmp_path)
    lines = [line for line in (tmp_path / "run.log").read_text().splitlines() if "step " in line and "loss" in line]
    assert len(lines) == 24
    assert all(line.endswith(" left") for line in lines[:-1])
    assert not lines[-1].endswith(" left")


def test_case__M8_a_line_has_the_accuracy_of_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_et.engine.train_log.SECONDS_BETWEEN_LINES", 0.0)
    with caplog_level():
        summary = run(tmp_path, data__val="scenes:10@32,seed=4", run__knn_interval=10)
    lines = [line for line in (tmp_path / "run.log").read_text().splitlines() if "knn top1" in line and "step " in line]
    values = {line["step"]: line["knn/top1"] for line in read_jsonl(tmp_path / "metrics.jsonl") if "knn/top1" in line}
    assert {0, 10, 20} < values.keys()
    assert f"knn top1 {values[0]:.3g} (step 0)" in lines[0]
    assert f"knn top1 {values[10]:.3g}  " in lines[9]
    assert f"knn top1 {values[10]:.3g} (step 10)" in lines[10]
    assert lines[-1].endswith(f"knn top1 {summary['knn_top1_after']:.3g}")
