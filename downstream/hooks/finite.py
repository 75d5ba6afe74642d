"""Stops a run of mmdetection or mmsegmentation at a loss or gradient that is not finite, before the update and the save."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from mae_et.errors import NonFiniteError
from mae_et.storage.atomic import atomic_path


@HOOKS.register_module()
class FiniteHook(Hook):
    """Checks the gradient of each step before the update, and its loss before anything is saved.

    In several processes the gradient is the mean over them, so all stop at the same step. With a loss scale (fp16) the
    scaler handles infinite gradients: it skips the update and lowers the scale. The hook stops when the scale falls below 1.
    The check does not add a wait for the device, as mmengine reads every loss.
    Raises:
        NonFiniteError: naming the step and a file with its losses and images.
    """

    priority = "ABOVE_NORMAL"  # before logs and checkpoints

    def __init__(self) -> None:
        self._runner: Any = None
        self._images: list[str] = []

    def before_train(self, runner: Any) -> None:
        self._runner = runner
        runner.optim_wrapper.optimizer.register_step_pre_hook(self._before_update)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        samples = data_batch.get("data_samples") or [] if isinstance(data_batch, dict) else []
        self._images = [str(getattr(sample, "img_path", "")) for sample in samples]

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        losses = {name: float(torch.as_tensor(x).detach()) for name, x in (outputs or {}).items() if "loss" in name}
        if bad := [name for name, value in losses.items() if not math.isfinite(value)]:
            self._stop(f"{bad[0]} = {losses[bad[0]]:g}", losses)
        scaler = getattr(runner.optim_wrapper, "loss_scaler", None)
        if scaler is not None and scaler.is_enabled() and scaler.get_scale() < 1:
            self._stop("the loss scale fell below 1: gradients overflow in fp16 at every step", losses)

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        scaler = getattr(self._runner.optim_wrapper, "loss_scaler", None)
        if scaler is not None and scaler.is_enabled():
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if not math.isfinite(norm):
            self._stop(f"gradient norm {norm:g}", {})

    def _stop(self, what: str, losses: Mapping[str, float]) -> NoReturn:
        step, wrapper = self._runner.iter + 1, self._runner.optim_wrapper
        dump = Path(self._runner.work_dir) / f"nonfinite_step_{step:08d}.json"
        if is_main_process():
            report = {
                "step": step,
                "what": what,
                "losses": {name: repr(value) for name, value in losses.items()},
                "lr": {group.get("name", i): group["lr"] for i, group in enumerate(wrapper.optimizer.param_groups)},
                "images_of_main_process": self._images,
            }
            with atomic_path(dump) as temporary:
                temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
        raise NonFiniteError(
            f"{what} at step {step}: stopped, and this step is not saved. {dump} lists losses and images. Common causes: fp16 "
            "(use optim_wrapper.dtype=bfloat16), optim_wrapper.optimizer.lr is too high, no optim_wrapper.clip_grad, a broken "
            "annotation. --resume continues from the checkpoint before"
        )
