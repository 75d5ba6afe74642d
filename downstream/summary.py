"""A hook that records a run of mmdetection or mmsegmentation: `environment.json`, `summary.json`, `test_summary*.json`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mae_et.runs.provenance import describe_environment, describe_weights, peak_memory_mb
from mae_et.runs.record_files import write_record
from mae_et.runs.records import DenseSummary, InitialWeights, TestSummary
from mae_et.storage.digest import state_digest

_KEPT = "mae_et_summary"  # in checkpoints


@HOOKS.register_module()
class SummaryHook(Hook):
    """Records what a training or an evaluation cost and reached. The fields are those of `mae_et.runs.records`.

    `train_seconds` and images/s exclude validation and saving. All counts are over all processes. A resumed run continues
    the counts of its checkpoint.

    Args:
        backbone: fields of `InitialWeights`; None: random weights. A checkpoint to resume from overrides None.
        tta: the evaluation uses several scales and flips.
        checkpoint: the name of the checkpoint that an evaluation judges.
        counts: what was dropped, converted or clipped before the run, by name.
        notes: what else a reader of the summary must know.
    """

    priority = "LOWEST"

    def __init__(
        self,
        backbone: Mapping[str, Any] | None = None,
        tta: bool = False,
        checkpoint: str | None = None,
        counts: Mapping[str, int] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.backbone, self.tta, self.checkpoint = backbone, tta, checkpoint
        self.counts, self.notes = dict(counts or {}), list(notes)
        self.metrics: list[dict[str, Any]] = []
        self.num_images, self.train_seconds = 0, 0.0
        self.num_steps, self.earlier_seconds = 0, 0.0
        self.first_loss: float | None = None
        self._last_loss: Any = None
        self._start, self._mark = time.perf_counter(), 0.0
        self._paused: float | None = None  # when the training paused

    def before_train(self, runner: Any) -> None:
        load_from = runner.cfg.get("load_from")
        if load_from and not runner.cfg.get("resume"):  # it replaced the weights of the backbone file
            weights = describe_weights(load_from)
            self.backbone = None if weights is None else {**weights.model_dump(), "role": "model"}
        self._write_environment(runner)

    def before_test(self, runner: Any) -> None:
        if not Path(runner.work_dir, "environment.json").exists():  # a training's own describes the training
            self._write_environment(runner)

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
        _wait_for_device()  # its pending work belongs to the training
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
            "notes": self.notes,
        }

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        noted = (checkpoint.get("message_hub") or {}).get("runtime_info") or {}
        if "best_ckpt" in noted:  # a better one deletes it: in this folder, not in the one that the run was copied from
            noted["best_ckpt"] = str(Path(runner.work_dir) / Path(noted["best_ckpt"]).name)
        kept = checkpoint.get(_KEPT)
        if kept is None:
            return
        self.backbone = kept["backbone"] if self.backbone is None else self.backbone
        if runner.cfg.get("resume"):
            self.metrics, self.first_loss = list(kept["metrics"]), kept["first_loss"]
            self.num_images, self.train_seconds = kept["num_images"], kept["train_seconds"]
            self.earlier_seconds = kept["seconds"]
            self.notes = [*kept["notes"], *(note for note in self.notes if note not in kept["notes"])]

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        self.metrics.append({"step": runner.iter, **plain(metrics)})

    def after_test_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        common = self._common(runner, runner.test_loop)
        record = TestSummary(**common, metrics=plain(metrics), tta=self.tta, checkpoint=self.checkpoint)
        if is_main_process():
            name = "test_summary_tta.json" if self.tta else "test_summary.json"
            write_record(Path(runner.work_dir, name), record)

    def after_train(self, runner: Any) -> None:
        record = DenseSummary(
            **self._common(runner, runner.val_loop),
            metrics=self.metrics[-1] if self.metrics else {},
            all_metrics=self.metrics,
            num_steps=runner.iter,
            num_steps_this_process=self.num_steps,
            first_loss=self.first_loss,
            last_loss=None if self._last_loss is None else float(self._last_loss),
            images_per_second=self.num_images / self.train_seconds if self.train_seconds else None,
            train_seconds=self.train_seconds,
        )
        if is_main_process():
            write_record(Path(runner.work_dir, "summary.json"), record)

    def _seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self._start

    def _common(self, runner: Any, loop: Any) -> dict[str, Any]:
        model = runner.model
        while hasattr(model, "module"):  # several processes, several scales
            model = model.module
        return {
            **describe(runner.cfg),
            "num_val": None if loop is None else len(loop.dataloader.dataset),
            "weights_sha256": state_digest(model.state_dict()),
            "config": Path(runner.cfg.filename or "").name,
            "initial_weights": None if self.backbone is None else InitialWeights(**self.backbone),
            "seconds": self._seconds(),
            "peak_memory_mb": peak_memory_mb(),
            "world_size": get_world_size(),
            "counts": self.counts,
            "notes": self.notes,
            "data_findings": getattr(runner, "findings", {}),
            "messages": list(getattr(runner, "messages", ())),
            "new_heads": sorted(getattr(runner, "new_heads", ())),
        }

    def _write_environment(self, runner: Any) -> None:
        if is_main_process():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            write_record(Path(runner.work_dir, "environment.json"), describe_environment(device, get_world_size()))


def describe(config: Any) -> dict[str, Any]:
    """Returns what is trained on what, from a config of mmdetection or mmsegmentation; None where the config is silent.

    Raises:
        KeyError: if the config's `default_scope` is neither mmdet nor mmseg.
    """
    model = config.model.get("module", config.model)
    splits, roots = {}, []
    for split in ("train", "val", "test"):
        dataset = (config.get(f"{split}_dataloader") or {}).get("dataset") or {}
        while "dataset" in dataset:  # a wrapper, such as RepeatDataset
            dataset = dataset["dataset"]
        roots.append(dataset.get("data_root"))
        splits[split] = dataset.get("ann_file") or (dataset.get("data_prefix") or {}).get("img_path")
    root = next((name for name in reversed(roots) if name), None)
    return {
        "kind": {"mmdet": "detection", "mmseg": "segmentation"}[config.get("default_scope")],
        "model": model.get("type"),
        "backbone_type": (model.get("backbone") or {}).get("type"),
        "data": None if root is None else Path(root).name,
        "data_splits": splits,
        "max_iters": (config.get("train_cfg") or {}).get("max_iters"),
        "seed": (config.get("randomness") or {}).get("seed"),
    }


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def plain(metrics: Mapping[str, Any] | None) -> dict[str, float | None]:
    """Returns metrics as JSON numbers; None where undefined: NaN, or COCO's -1 for "no such object".

    Values that are not numbers are left out.
    """
    numbers: dict[str, float | None] = {}
    for key, value in dict(metrics or {}).items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        is_undefined = not math.isfinite(number) or (key.startswith("coco/") and number < 0)
        numbers[key] = None if is_undefined else number
    return numbers
