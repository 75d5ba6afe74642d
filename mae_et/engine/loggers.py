"""Where a run shows its numbers besides metrics.jsonl: TensorBoard, a CSV file, Weights & Biases, MLflow.

A training does not depend on a logger. An error of a logger ends in one warning, and each entry that it did not take is
counted. Loggers with a server run in a thread of their own behind a bounded queue, so a slow server holds up no step.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from mae_et.config.validation import flat
from mae_et.errors import UserError
from mae_et.storage.atomic import atomic_path, first_line

log = logging.getLogger(__name__)

EXTRAS = {"wandb": "wandb", "mlflow": "mlflow"}  # logger -> the package that it needs, also the name of the extra
IDS = "loggers.json"  # in the run folder: the runs at the servers, which a resumed run continues
PROJECT = "mae-et"
QUEUE_SIZE = 1000
CLOSE_SECONDS = 30.0  # limit of the wait for what is still queued
MLFLOW_PARAMS = 100  # limit of MLflow for one request


class Logger(Protocol):
    """Takes scalars and pictures. Any method may raise any error."""

    def add_scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None: ...

    def close(self, ok: bool) -> None: ...


class Loggers:
    """The loggers of a run, as one. No method raises an error of a logger.

    Args:
        names: of the loggers, as in `run.loggers`.
        work_dir: the run folder.
        step: steps done; TensorBoard and CSV drop what a stopped run had written of later steps.
        config: of the run; shown by the loggers with a server.
        lost: gets the number of entries that each logger did not take; the numbers of a resumed run continue.
    """

    def __init__(
        self, names: Sequence[str], work_dir: Path, step: int, config: Mapping[str, Any], lost: dict[str, int]
    ) -> None:
        self.lost = lost
        self.lock = threading.Lock()
        self.loggers: dict[str, Logger] = {}
        self.warned: set[str] = set()
        for name in names:
            lost.setdefault(name, 0)  # the threads add no keys, so the numbers can be read at any time
            with self._guarded(name):
                self.loggers[name] = self._open(name, work_dir, step, config)

    def _open(self, name: str, work_dir: Path, step: int, config: Mapping[str, Any]) -> Logger:
        if name == "tensorboard":
            return TensorBoardLogger(work_dir / "tensorboard", step)
        if name == "csv":
            return CsvLogger(work_dir / "metrics.csv", step)
        # Imported here and not in the thread: a loader process that is forked during an import could not import any more.
        import_module(EXTRAS[name])
        kind: Callable[[Path, Mapping[str, Any]], Logger] = WandbLogger if name == "wandb" else MlflowLogger
        return InThread(lambda: kind(work_dir, config), lambda error: self._lose(name, error))

    def add_scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Passes scalars on. Unknown values (None) are left out."""
        known = {name: float(value) for name, value in values.items() if value is not None}
        for name, logger in self.loggers.items():
            with self._guarded(name):
                logger.add_scalars(known, step)

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Passes a picture on.

        Args:
            name: of the series of pictures.
            pixels: [H, W, 3] uint8.
            step: steps done.
        """
        for logger_name, logger in self.loggers.items():
            with self._guarded(logger_name):
                logger.add_image(name, pixels, step)

    def close(self, ok: bool = True) -> None:
        """Waits for what is queued, `CLOSE_SECONDS` at most, and closes the loggers.

        Args:
            ok: whether the run ends without an error.
        """
        for name, logger in self.loggers.items():
            with self._guarded(name):
                logger.close(ok)
        for name in self.warned:
            log.warning("%s: %d entries are lost; metrics.jsonl has them", name, self.lost[name])

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Any:
        try:
            yield
        except Exception as error:  # a logger may raise anything
            self._lose(name, error)

    def _lose(self, name: str, error: Exception) -> None:
        with self.lock:
            self.lost[name] += 1
            is_first = name not in self.warned
            self.warned.add(name)
        if is_first:
            log.warning(
                "the logger %r fails, and the training continues without it: %s: %s. metrics.jsonl keeps all numbers",
                name, type(error).__name__, first_line(error),
            )  # fmt: skip


class TensorBoardLogger:
    """Writes event files."""

    def __init__(self, folder: Path, step: int) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self, ok: bool) -> None:
        self.writer.close()


class CsvLogger:
    """Writes a table with a row for each entry and a column for each scalar; a new scalar adds a column."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        rows: list[dict[str, str]] = []
        self.columns = ["step"]
        if step and path.exists():
            with path.open(newline="") as file:
                table = csv.DictReader(file)
                rows = [row for row in table if (row["step"] or "").isdecimal() and int(row["step"]) <= step]
                self.columns = list(table.fieldnames or self.columns)
        self._write_all(rows)

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        new = [name for name in values if name not in self.columns]
        if new:
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            self.columns += new
            self._write_all(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({"step": step, **values})

    def _write_all(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with atomic_path(self.path) as temporary, temporary.open("w", newline="") as file:
            table = csv.DictWriter(file, self.columns)
            table.writeheader()
            table.writerows(rows)

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        return  # a table holds no pictures; they are in reconstructions/

    def close(self, ok: bool) -> None:
        return


class WandbLogger:
    """A run of Weights & Biases. The x axis is `step`, so that a resumed run can log a step again.

    WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and the other variables of W&B apply.
    """

    def __init__(self, work_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb

        run_id = _read_ids(work_dir).get("wandb") or secrets.token_hex(4)
        _write_id(work_dir, "wandb", run_id)
        self.image = wandb.Image
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=work_dir.resolve().name,
            id=run_id,
            resume="allow",
            dir=str(work_dir),
            config=dict(config),
            # No question at the terminal, and our log lines stay where they are.
            settings=wandb.Settings(silent=True, console="off", login_timeout=1),
        )
        self.run.define_metric("*", step_metric="step")

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({"step": step, **values})

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.run.log({"step": step, name: self.image(pixels)})

    def close(self, ok: bool) -> None:
        self.run.finish(exit_code=0 if ok else 1)


class MlflowLogger:
    """A run of MLflow, at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, work_dir: Path, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self.metric, self.client = Metric, MlflowClient()
        run_id = _read_ids(work_dir).get("mlflow")
        if run_id is not None:
            self.client.update_run(run_id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self.client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self.client.create_experiment(name)
            run_id = self.client.create_run(number, run_name=work_dir.resolve().name).info.run_id
            _write_id(work_dir, "mlflow", run_id)
            params = [Param(key, str(value)) for key, value in flat(config)]
            for start in range(0, len(params), MLFLOW_PARAMS):
                self.client.log_batch(run_id, params=params[start : start + MLFLOW_PARAMS])
        self.run_id = run_id

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(
            self.run_id, metrics=[self.metric(name, value, now, step) for name, value in values.items()]
        )

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.client.log_image(self.run_id, pixels, f"{name}/step_{step:08d}.png")

    def close(self, ok: bool) -> None:
        self.client.set_terminated(self.run_id, "FINISHED" if ok else "FAILED")


class InThread:
    """Runs a logger in a daemon thread. Its methods return at once; `close` waits for a bounded time.

    Args:
        make: opens the logger, in the thread.
        lose: gets the error of each entry that is lost, in any thread.
    """

    def __init__(self, make: Callable[[], Logger], lose: Callable[[Exception], None]) -> None:
        self.make, self.lose = make, lose
        self.queue: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(QUEUE_SIZE)
        self.thread = threading.Thread(target=self._run, name="logger", daemon=True)
        self.thread.start()

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        self._put("add_scalars", dict(values), step)

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self._put("add_image", name, pixels, step)

    def close(self, ok: bool) -> None:
        deadline, num_not_entries = time.monotonic() + CLOSE_SECONDS, 0
        with contextlib.suppress(queue.Full):
            self.queue.put(("close", (ok,)), timeout=CLOSE_SECONDS)
            num_not_entries = 1  # the request to close
            self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            late = TimeoutError(f"it did not take all entries within {CLOSE_SECONDS:g} s of the end")
            for _ in range(max(1, self.queue.qsize() - num_not_entries)):
                self.lose(late)

    def _put(self, method: str, *arguments: Any) -> None:
        try:
            self.queue.put_nowait((method, arguments))
        except queue.Full:
            raise TimeoutError(f"it is slower than the training, and {QUEUE_SIZE} entries wait for it") from None

    def _run(self) -> None:
        logger, failure = None, None
        try:
            logger = self.make()
        except Exception as error:
            failure = error
        method = ""
        while method != "close":
            method, arguments = self.queue.get()
            try:
                if failure is None:
                    getattr(logger, method)(*arguments)
                elif method != "close":
                    raise failure
            except Exception as error:
                self.lose(error)


def check_installed(names: Sequence[str]) -> None:
    """Refuses loggers whose package is missing.

    Raises:
        UserError: names the extra that brings it.
    """
    for name in names:
        if name in EXTRAS and find_spec(EXTRAS[name]) is None:
            raise UserError(
                f"run.loggers has {name!r}, but the package {EXTRAS[name]} is not installed: run `pip install "
                f"'mae_et[{name}]'`, or remove it from run.loggers"
            )


def forget_ids(work_dir: Path) -> None:
    """Makes the next training in a folder a new run at the servers."""
    (work_dir / IDS).unlink(missing_ok=True)


def _read_ids(work_dir: Path) -> dict[str, str]:
    path = work_dir / IDS
    return json.loads(path.read_text()) if path.exists() else {}


_ids_lock = threading.Lock()


def _write_id(work_dir: Path, name: str, value: str) -> None:
    with _ids_lock, atomic_path(work_dir / IDS) as temporary:
        temporary.write_text(json.dumps({**_read_ids(work_dir), name: value}) + "\n")
