"""A hook that sums up a run in `summary.json`."""

from __future__ import annotations

import hashlib
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
from mae_et.storage.backbone import read_backbone, state_digest
from mae_et.storage.checkpoint import atomic_path

_KEPT = "mae_et_summary"  # in checkpoints


@HOOKS.register_module()
class SummaryHook(Hook):
    """Writes what a training or a test cost and reached: metrics, wall time, images/s, memory, where the backbone comes from.

    Times of training are without validation and saving; all counts are over all processes. A resumed run goes on counting
    from its checkpoint. `weights_sha256` is that of the whole model: an evaluation and the training that it judges have the
    same.
    Args:
        backbone: as from `provenance`; of a run that is resumed, what its checkpoint says.
        tta: whether an evaluation sees several scales and flips.
        checkpoint: the name of what an evaluation judges.
    """

    priority = "LOWEST"

    def __init__(
        self, backbone: dict[str, Any] | None = None, tta: bool = False, checkpoint: str | None = None
    ) -> None:
        self.backbone, self.tta, self.checkpoint = backbone, tta, checkpoint
        self.metrics: list[dict[str, Any]] = []
        self.num_images, self.train_seconds = 0, 0.0
        self.num_steps, self.earlier_seconds = 0, 0.0
        self.first_loss: float | None = None
        self._last_loss: Any = None
        self._start, self._mark = time.perf_counter(), 0.0
        self._paused: float | None = None  # since when the training has been

    def before_train_epoch(self, runner: Any) -> None:
        self._mark, self._paused = time.perf_counter(), None

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        now = time.perf_counter()
        if self.num_steps:  # the first one warms up
            self.train_seconds += (now if self._paused is None else self._paused) - self._mark
            self.num_images += len(data_batch["inputs"]) * get_world_size()
        self._mark, self._paused, self.num_steps = now, None, self.num_steps + 1
        loss = (outputs or {}).get("loss")
        if loss is not None:
            self._last_loss = loss.detach()
            self.first_loss = float(self._last_loss) if self.first_loss is None else self.first_loss

    def before_val(self, runner: Any) -> None:
        _wait_for_device()  # its work is still the training's
        self._paused = time.perf_counter()
        self.train_seconds += self._paused - self._mark if self.num_steps > 1 else 0.0

    def after_val(self, runner: Any) -> None:
        self._mark, self._paused = time.perf_counter(), None

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        if self._paused is None:
            _wait_for_device()
            self._paused = time.perf_counter()
        checkpoint[_KEPT] = {
            "backbone": self.backbone,
            "metrics": self.metrics,
            "num_images": self.num_images,
            "train_seconds": self.train_seconds,
            "seconds": self._seconds(),
            "first_loss": self.first_loss,
        }

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        noted = (checkpoint.get("message_hub") or {}).get("runtime_info") or {}
        if "best_ckpt" in noted:  # a better one removes it: in this folder, not where the run was copied from
            noted["best_ckpt"] = str(Path(runner.work_dir) / Path(noted["best_ckpt"]).name)
        kept = checkpoint.get(_KEPT)
        if kept is None:
            return
        self.backbone = self.backbone or kept["backbone"]
        if runner.cfg.get("resume"):
            self.metrics, self.first_loss = list(kept["metrics"]), kept["first_loss"]
            self.num_images, self.train_seconds = kept["num_images"], kept["train_seconds"]
            self.earlier_seconds = kept["seconds"]

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        self.metrics.append({"step": runner.iter, **plain(metrics)})

    def after_test_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        values = {"status": "tested", "tta": self.tta, "checkpoint": self.checkpoint, "metrics": plain(metrics)}
        self._write(runner, "test_summary_tta.json" if self.tta else "test_summary.json", values)

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
        }
        self._write(runner, "summary.json", summary)

    def _seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self._start

    def _write(self, runner: Any, name: str, values: dict[str, Any]) -> None:
        if not is_main_process():
            return
        model = runner.model
        while hasattr(model, "module"):  # several processes, several scales
            model = model.module
        loop = runner.test_loop if values["status"] == "tested" else runner.val_loop
        common = {
            **describe(runner.cfg),
            "num_val": None if loop is None else len(loop.dataloader.dataset),
            "weights_sha256": state_digest(model.state_dict()),
            "config": Path(runner.cfg.filename or "").name,
            "backbone": self.backbone,
            "seconds": self._seconds(),
            "peak_memory_mb": peak_memory_mb(),
            "num_processes": get_world_size(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "mae_et": mae_et.__version__,
            "start": getattr(runner, "notes", {}),
        }
        with atomic_path(Path(runner.work_dir, name)) as temporary:
            temporary.write_text(json.dumps({**values, **common}, indent=2), encoding="utf-8")


def describe(config: Any) -> dict[str, Any]:
    """Returns what was trained on what, from a config of mmdetection or mmsegmentation; None where it does not say."""
    model = config.model.get("module", config.model)
    splits, roots = {}, []
    for split in ("train", "val", "test"):
        dataset = (config.get(f"{split}_dataloader") or {}).get("dataset") or {}
        while "dataset" in dataset:  # repeated, say
            dataset = dataset["dataset"]
        roots.append(dataset.get("data_root"))
        splits[split] = dataset.get("ann_file") or (dataset.get("data_prefix") or {}).get("img_path")
    root = next((name for name in reversed(roots) if name), None)
    return {
        "task": {"mmdet": "detection", "mmseg": "segmentation"}.get(config.get("default_scope"), "unknown"),
        "model": model.get("type"),
        "backbone_type": (model.get("backbone") or {}).get("type"),
        "data": None if root is None else Path(root).name,
        "data_splits": splits,
        "max_iters": (config.get("train_cfg") or {}).get("max_iters"),
        "seed": (config.get("randomness") or {}).get("seed"),
    }


def provenance(path: str | None) -> dict[str, Any] | None:
    """Returns where a backbone comes from: the file, its SHA-256 and what it says of its pre-training.

    Args:
        path: None: random weights; "timm": timm's own, from the network.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        return {"file": path}
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    try:
        metadata = read_backbone(path)[1]
    except UserError:  # a file that only the library reads
        metadata = {}
    return {"file": Path(path).name, "sha256": digest.hexdigest(), "metadata": metadata}


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
