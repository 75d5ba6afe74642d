"""The loggers of a run: what they get, what a resumed run continues, and that none of them can stop a training."""

from __future__ import annotations

import builtins
import csv
import json
import logging
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.engine import loggers
from mae_et.engine.loggers import IDS, CsvLogger, InThread, Loggers, check_installed, forget_ids
from mae_et.engine.train_log import ProgressBar
from mae_et.errors import ConfigError, StoppedEarly, UserError
from mae_et.storage.metrics_file import read_jsonl
from mae_et.tasks import pretrain
from mae_et.tasks.run import run_training
from tests.conftest import changing_loss, losses, small_values
from tests.plans import plan_for

PIXELS = np.zeros((4, 4, 3), np.uint8)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv__new_columns_and_a_resumed_run_keep_one_table(tmp_path: Path) -> None:
    table = CsvLogger(tmp_path / "metrics.csv", 0)
    table.add_scalars({"loss": 1.5}, 1)
    table.add_scalars({"knn/top1": 0.25, "loss": 1.0}, 2)
    table.add_scalars({"loss": 0.5}, 3)
    again = CsvLogger(tmp_path / "metrics.csv", 2)  # the checkpoint is from step 2
    again.add_scalars({"loss": 0.75}, 3)
    assert rows(tmp_path / "metrics.csv") == [
        {"step": "1", "loss": "1.5", "knn/top1": ""},
        {"step": "2", "loss": "1.0", "knn/top1": "0.25"},
        {"step": "3", "loss": "0.75", "knn/top1": ""},
    ]
    CsvLogger(tmp_path / "metrics.csv", 0)  # a new run
    assert rows(tmp_path / "metrics.csv") == []


class Server:
    """Stands for a logger with a server."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.is_free = threading.Event()

    def add_scalars(self, values: Any, step: int) -> None:
        self.is_free.wait()
        if step == 2:
            raise ConnectionError("the server is away")
        self.seen.append((values, step))

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.seen.append((name, step))

    def close(self, ok: bool) -> None:
        self.seen.append(("close", ok))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(loggers, "WandbLogger", lambda work_dir, config: server)
    monkeypatch.setattr(loggers, "import_module", lambda name: None)
    return server


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_loggers__an_error_costs_one_entry_and_one_warning(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = {"wandb": 2}  # of the run before it was resumed
    server.is_free.set()
    writer = Loggers(["wandb", "csv"], tmp_path, 0, {}, lost)
    for step in (1, 2, 3):
        writer.add_scalars({"loss": 1.0, "unknown": None}, step)
    writer.add_image("pictures", PIXELS, 3)
    writer.close(ok=False)
    assert server.seen == [({"loss": 1.0}, 1), ({"loss": 1.0}, 3), ("pictures", 3), ("close", False)]
    assert lost == {"wandb": 3, "csv": 0}
    assert len(rows(tmp_path / "metrics.csv")) == 3
    first, last = warnings(caplog)
    assert "'wandb' fails" in first
    assert "the server is away" in first
    assert "wandb: 3 entries are lost" in last


def test_loggers__a_server_that_hangs_holds_up_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "QUEUE_SIZE", 4)
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.05)
    lost: dict[str, int] = {}
    writer = Loggers(["wandb"], tmp_path, 0, {}, lost)
    start = time.monotonic()
    for step in range(10, 20):
        writer.add_scalars({"loss": 1.0}, step)
    writer.close()
    assert time.monotonic() - start < 1
    assert lost["wandb"] >= 9  # one may be in the thread's hands
    server.is_free.set()


def test_loggers__one_that_cannot_be_opened_loses_all_its_entries(tmp_path: Path) -> None:
    lost: list[Exception] = []

    def make() -> Any:
        raise RuntimeError("no key")

    logger = InThread(make, lost.append)
    logger.add_scalars({"loss": 1.0}, 1)
    logger.add_image("pictures", PIXELS, 1)
    logger.close(ok=True)
    assert [str(error) for error in lost] == ["no key"] * 2


def test_check_installed__names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    check_installed(["tensorboard", "csv"])
    with pytest.raises(UserError, match=r"pip install 'mae_et\[mlflow\]'"):
        check_installed(["csv", "mlflow"])


def test_config__a_logger_is_named_once() -> None:
    with pytest.raises(ConfigError, match="more than once"):
        from_dict(PretrainConfig, small_values(run__loggers=["csv", "csv"]))


def test_wandb_offline_and_mlflow_files__a_resumed_run_continues_the_same_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the packages themselves; only a server is missing."""
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    work_dir, lost = tmp_path / "run", dict[str, int]()
    work_dir.mkdir()
    for step in (0, 2):
        writer = Loggers(["wandb", "mlflow"], work_dir, step, {"model": {"mask_ratio": 0.5}}, lost)
        writer.add_scalars({"train/loss": 1.0 / (step + 1), "knn/top1": None}, step + 1)
        if step:
            writer.add_image("reconstructions", PIXELS, step + 1)
        writer.close(ok=step > 0)
    assert lost == {"wandb": 0, "mlflow": 0}

    ids = json.loads((work_dir / IDS).read_text())
    files = list(work_dir.glob("wandb/offline-run-*/*.wandb"))
    assert [path.stem for path in files] == [f"run-{ids['wandb']}"] * 2  # a file for each start, of the same run
    client = MlflowClient()
    run = client.get_run(ids["mlflow"])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"model.mask_ratio": "0.5"}
    history = client.get_metric_history(ids["mlflow"], "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (3, pytest.approx(1 / 3))]
    assert [file.path for file in client.list_artifacts(ids["mlflow"], "reconstructions")]
    forget_ids(work_dir)  # a run that starts again is another run
    assert not (work_dir / IDS).exists()


def test_pretrain__loggers_that_fail_change_no_loss_and_are_counted_over_a_stop(tmp_path: Path, server: Server) -> None:
    def config(*names: str) -> PretrainConfig:
        stages = [{"compute_fraction": 1.0, "bandwidth": 16}]
        values = small_values(
            run__loggers=names,
            run__save_interval=4,
            curriculum__stages=stages,
            curriculum__equivalent_epochs=1.0 + 1 / 16,
        )
        return from_dict(PretrainConfig, values)

    def stop(number: int, loss: Any) -> Any:
        if number == 6:
            signal.raise_signal(signal.SIGTERM)
        return loss

    server.is_free.set()
    run_training(pretrain.MAETask, config(), tmp_path / "plain", device="cpu")
    work_dir = tmp_path / "run"
    task_type = changing_loss(pretrain.MAETask, stop)
    with pytest.raises(StoppedEarly):
        run_training(task_type, config("wandb", "csv"), work_dir, device="cpu")
    assert server.seen[-1] == ("close", False)
    summary = run_training(pretrain.MAETask, config("wandb", "csv"), work_dir, resume=True, device="cpu")
    assert server.seen[-1] == ("close", True)
    assert losses(work_dir) == losses(tmp_path / "plain")
    num_lost = len([line for line in read_jsonl(work_dir / "metrics.jsonl") if line["step"] == 2])
    assert summary["lost_entries"] == {"wandb": num_lost}  # of step 2, before the stop
    table = {int(row["step"]): float(row["train/loss"]) for row in rows(work_dir / "metrics.csv") if row["train/loss"]}
    assert table == losses(work_dir)
    assert any(row["stage/images_per_second"] for row in rows(work_dir / "metrics.csv"))
    assert not (tmp_path / "plain/tensorboard").exists()
    assert not (tmp_path / "plain/metrics.csv").exists()


def test_progress_bar__a_notebook_gets_a_bar_and_the_log_gets_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config = from_dict(PretrainConfig, small_values())
    plan = plan_for(config, 20)
    step = plan.num_steps // 2
    entry = {"step": step, "stage": 1, "loss": 0.5, "lr": 1e-3, "images_per_second": 10.0, "compute_fraction": 0.5}
    caplog.set_level(logging.INFO, "mae_et")

    def show() -> tuple[str, str]:
        caplog.clear()
        bar = ProgressBar(plan, 0, hidden=False)
        bar.show(entry, seconds_left=75.0)
        bar.advance(step)
        bar.close()
        return capsys.readouterr().err, caplog.text

    drawn, logged = show()
    assert "%|" not in drawn  # neither a terminal nor a notebook
    assert "01:15 left" in logged
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    drawn, logged = show()
    assert "%|" in drawn
    assert "01:15 left" in drawn
    assert "01:15 left" in logged
