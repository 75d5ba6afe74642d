"""Starts by srun, the sbatch template, and agents of torchrun that are lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mae_et.engine.distributed import join_world
from mae_et.engine.slurm import first_host, slurm_variables, tasks_per_node
from mae_et.errors import UserError
from tests import processes
from tests.conftest import REPOSITORY, changing_loss, losses
from tests.integration.test_parallel import FSDP, Quiet, names, train

STEP = {
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "123456", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip


# -------------------------------------------------------------------- Slurm's variables


def test_slurm_variables__of_a_step() -> None:
    assert slurm_variables(STEP) == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu07", "MASTER_PORT": "18456",
    }  # fmt: skip
    kept = slurm_variables({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"})
    assert (kept["MASTER_ADDR"], kept["MASTER_PORT"]) == ("10.0.0.1", "99")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # the batch script itself
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {**STEP, "WORLD_SIZE": "16", "RANK": "3"},  # torchrun inside a step with one task on each node
    ],
)
def test_slurm_variables__not_for_other_processes(environment: dict[str, str]) -> None:
    assert slurm_variables(environment) == {}


@pytest.mark.parametrize(
    "change", [{"SLURM_STEP_NODELIST": "[]"}, {"SLURM_STEP_TASKS_PER_NODE": "4"}, {"SLURM_NODEID": "x"}]
)
def test_slurm_variables__that_cannot_be_read(change: dict[str, str]) -> None:
    with pytest.raises(UserError, match="one of 7 tasks of a Slurm step"):
        slurm_variables({**STEP, **change})
    with pytest.raises(UserError, match="SLURM_LOCALID"):
        slurm_variables({key: value for key, value in STEP.items() if key != "SLURM_LOCALID"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu3", "gpu3"), ("gpu[03-05,09],cpu1", "gpu03"), ("a1,b2", "a1"), ("rack2-n[10,12]-ib", "rack2-n10-ib")],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_tasks_per_node() -> None:
    assert tasks_per_node("4(x2),3") == [4, 4, 3]


def of_step(rank: int, num: int, port: int) -> dict[str, str]:
    """Returns what srun sets for a task of a step on this machine."""
    return {
        "SLURM_STEP_NUM_TASKS": str(num), "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": str(num),
        "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def train_with_signal(work_dir: Path) -> None:
    """The second task gets SIGUSR1 in step 4, and both stop."""

    def change(number: int, loss: torch.Tensor) -> torch.Tensor:
        if number == 4 and os.environ["SLURM_PROCID"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        return loss

    train(work_dir, task=changing_loss(Quiet, change), run__gradient_dtype="bf16")


def test_srun__starts_without_torchrun_and_stops_on_sigusr1(tmp_path: Path) -> None:
    ended = processes.run(partial(train_with_signal, tmp_path / "run"), 2, tmp_path / "output", of_step)
    assert [code for code, _ in ended] == [75, 75], [text[-2000:] for _, text in ended]
    assert names(tmp_path / "run")[-1] == "step_00000005.pt"
    train(tmp_path / "run", resume=True, run__gradient_dtype="bf16")
    train(tmp_path / "alone")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-2)


# -------------------------------------------------------------------- the template


def submit(folder: Path, srun_code: int, *words: str, **variables: str) -> tuple[int, str, str]:
    """Runs the template with programs in the place of Slurm's. Returns its code, and what they were called with."""
    for name, code in (("srun", srun_code), ("scontrol", 0)):
        program = folder / name
        program.write_text(f'#!/bin/bash\nprintf "%s|" "$@" > {folder}/{name}.txt\nexit {code}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        (folder / f"{name}.txt").write_text("")
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "41", **variables}
    command = ["bash", str(REPOSITORY / "tools/pretrain.sbatch"), *words]
    code = subprocess.run(command, env=environment, capture_output=True, text=True, check=False).returncode
    return code, (folder / "srun.txt").read_text(), (folder / "scontrol.txt").read_text()


def test_sbatch__requeues_what_was_stopped_and_nothing_else(tmp_path: Path) -> None:
    assert submit(tmp_path, 75, "demo", "w d") == (
        75,
        "--kill-on-bad-exit=1|python|tools/pretrain.py|demo|--work-dir|w d|--resume|",
        "requeue|41|",
    )
    for code in (0, 1):
        assert submit(tmp_path, code, "demo", "w")[::2] == (code, "")
    assert submit(tmp_path, 0, "demo")[:2] == (2, "")


def test_sbatch__array_of_seeds(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2"}
    _, started, requeued = submit(tmp_path, 75, "demo", "w", "--device", "cpu", **array)
    assert "--work-dir|w/seed_2|--resume|--cfg-options|run.seed=2|--device|cpu|" in started
    assert requeued == "requeue|40_2|"


# -------------------------------------------------------------------- torchrun with restarts

ELASTIC: dict[str, Any] = {
    **FSDP,
    "run__save_interval": 1,
    "batch__early_large_batch": {"rule": "area", "max_global_batch_size": 16},
}


def train_or_lose_the_node(work_dir: Path, lost_agent: int) -> None:
    """In its fifth step the node of one agent is lost: agent and training process end without warning."""
    marker = work_dir.parent / "lost"

    def change(number: int, loss: torch.Tensor) -> torch.Tensor:
        if os.environ["WORLD_SIZE"] == "1" and not marker.exists():
            time.sleep(1)  # the other agent is late: it joins in the middle, and both start again
        if number == 4 and os.getpgrp() == lost_agent:
            marker.touch()
            os.killpg(lost_agent, signal.SIGKILL)
        return loss

    train(work_dir, task=changing_loss(Quiet, change), **ELASTIC)


def agent(work_dir: Path, port: int, is_lost: bool) -> None:
    """Runs what `torchrun --nnodes 1:2 --nproc_per_node 1 --max-restarts 2` runs."""
    os.setpgrp()
    with open(work_dir.parent / f"agent_{is_lost}.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    config = LaunchConfig(
        min_nodes=1, max_nodes=2, nproc_per_node=1, run_id="run", rdzv_backend="c10d", rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"last_call_timeout": 2, "keep_alive_interval": 1, "keep_alive_max_attempt": 2},
        max_restarts=2, monitor_interval=0.2, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, train_or_lose_the_node)(work_dir, os.getpgrp() if is_lost else -1)


def test_torchrun__one_of_two_agents_is_lost(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    port = processes.free_port()
    survivor = context.Process(target=agent, args=(tmp_path / "run", port, False))
    survivor.start()
    wait_for_port(port)  # it holds the rendezvous
    lost = context.Process(target=agent, args=(tmp_path / "run", port, True))
    lost.start()
    for process in (lost, survivor):
        process.join(200)
        process.kill()
    shown = (tmp_path / "agent_False.txt").read_text()
    assert lost.exitcode == -signal.SIGKILL, shown[-3000:]
    assert survivor.exitcode == 0, shown[-3000:]
    train(tmp_path / "alone", **ELASTIC)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    saves = names(tmp_path / "run")
    assert any("." not in name for name in saves)  # written by two
    assert saves[-1].endswith(".pt")  # written by one


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens at port {port}")


def test_join_world__incomplete_variables_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="SLURM_STEP_ID"), join_world("cpu"):
        pass
