"""A hook that sums up a run in `summary.json`."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

import mae_et
from mae_et.errors import UserError
from mae_et.export import read_backbone


@HOOKS.register_module()
class SummaryHook(Hook):
    """Writes what a training or a test cost and reached: metrics, wall time, images/s, memory, where the backbone comes from.

    Times of training are without validation and saving; all counts are over all processes.
    """

    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.num_images, self.num_steps, self.train_seconds = 0, 0, 0.0
        self.first_loss: float | None = None
        self._last_loss: Any = None
        self._start, self._mark = time.perf_counter(), 0.0
        self._provenance: dict[str, Any] | None = None

    def before_train(self, runner: Any) -> None:
        self._start = time.perf_counter()
        self._provenance = provenance(runner.cfg)

    def before_train_epoch(self, runner: Any) -> None:
        self._mark = time.perf_counter()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        now = time.perf_counter()
        if self.num_steps:  # the first one warms up
            self.train_seconds += now - self._mark
            self.num_images += len(data_batch["inputs"]) * get_world_size()
        self._mark, self.num_steps = now, self.num_steps + 1
        loss = (outputs or {}).get("loss")
        if loss is not None:
            self._last_loss = loss  # not read yet: that would wait for the GPU
            self.first_loss = float(loss) if self.first_loss is None else self.first_loss

    def before_val(self, runner: Any) -> None:
        self._pause = time.perf_counter()

    def after_val(self, runner: Any) -> None:
        self._mark += time.perf_counter() - self._pause

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        self.metrics.append({"step": runner.iter, **plain(metrics)})

    def after_test_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        self._write(runner, {"status": "tested", "metrics": plain(metrics)})

    def after_train(self, runner: Any) -> None:
        summary = {
            "status": "finished",
            "metrics": self.metrics[-1] if self.metrics else {},
            "all_metrics": self.metrics,
            "num_steps": runner.iter,
            "num_steps_this_process": self.num_steps,
            "first_loss": self.first_loss,
            "last_loss": None if self._last_loss is None else float(self._last_loss),
            "images_per_second": self.num_images / self.train_seconds if self.train_seconds else None,
            "train_seconds": self.train_seconds,
            "backbone": self._provenance,
        }
        self._write(runner, summary)

    def _write(self, runner: Any, values: dict[str, Any]) -> None:
        if not is_main_process():
            return
        common = {
            "config": Path(runner.cfg.filename or "").name,
            "seconds": time.perf_counter() - self._start,
            "peak_memory_mb": peak_memory_mb(),
            "num_processes": get_world_size(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "mae_et": mae_et.__version__,
        }
        name = "summary.json" if values["status"] == "finished" else "test_summary.json"
        Path(runner.work_dir, name).write_text(json.dumps({**values, **common}, indent=2), encoding="utf-8")


def provenance(config: Any) -> dict[str, Any] | None:
    """Returns where the backbone of a config comes from: the file and its metadata; None where it starts at random."""
    init_cfg = (config.model.get("backbone") or {}).get("init_cfg")
    path = (init_cfg or {}).get("checkpoint")
    if path is None:
        return None
    try:
        return {"file": Path(path).name, **read_backbone(path)[1]}
    except (UserError, OSError):  # timm's own, from the network, or the library's
        return {"file": str(path)}


def peak_memory_mb() -> float:
    """Returns the peak memory of this process: the GPU's where there is one, else the resident set, in MB (2^20)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def plain(metrics: Mapping[str, Any] | Sequence[Any] | None) -> dict[str, float]:
    """Returns metrics as numbers that JSON knows; what is no number is left out."""
    numbers = {}
    for key, value in dict(metrics or {}).items():
        try:
            numbers[key] = float(value)
        except (TypeError, ValueError):
            continue
    return numbers
