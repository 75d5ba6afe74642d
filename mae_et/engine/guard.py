"""Keeps NaN and infinity out of the parameters: a faulty step is stopped BEFORE its update.

On a CPU each step is looked at. On a GPU that would make the host wait for the device at every step, so the fused optimizer
is told on the device to leave out the update, and every later one once more steps were bad than may be skipped; the host
finds out at the next log or save, when the parameters are still those before the faulty update. Where the optimizer is not
fused (LARS) or a loss scaler is at work (fp16), the host looks at each step there too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mae_et.engine.distributed import World
from mae_et.engine.progress import Progress
from mae_et.errors import NonFiniteError
from mae_et.storage.atomic import atomic_path

log = logging.getLogger(__name__)


class FiniteWatch:
    """Looks at each step's loss and gradient norm.

    Args:
        optimizer: told on the device where it is a fused one on a GPU.
        world: a step that is bad in one process is bad in all.
        max_skipped: steps that may be left out before the run stops.
        scaler: under a loss scale, infinite gradients are its business (it leaves the update out and lowers the scale) until
            the scale falls below 1.
        progress: `num_skipped` is kept in it.
        state: gives what the dump holds.
        work_dir: gets the dump.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        world: World,
        max_skipped: int,
        scaler: torch.amp.GradScaler,
        progress: Progress,
        state: Callable[[], dict[str, Any]],
        work_dir: Path,
        on_device: bool | None = None,
    ) -> None:
        self.optimizer, self.world, self.max_skipped, self.scaler = optimizer, world, max_skipped, scaler
        self.progress, self.state, self.work_dir = progress, state, work_dir
        self.on_device = world.device.type == "cuda" if on_device is None else on_device
        # An unfused optimizer cannot be told, and a loss scaler tells it itself: then the host looks at each step.
        self.on_device = self.on_device and bool(optimizer.defaults.get("fused")) and not scaler.is_enabled()
        self.num_bad = torch.full((), float(progress.num_skipped), device=world.device)
        self.recent: list[tuple[int, float, Tensor, Tensor, Tensor, list[Tensor]]] = []  # since the last check

    def look(self, step: int, loss: Tensor, grad_norm: Tensor, places: list[Tensor]) -> Tensor:
        """Returns 1.0 for a finite step, 0.0 for another, on the device."""
        finite = torch.isfinite(loss)
        if not self.scaler.is_enabled():
            finite = finite & torch.isfinite(grad_norm)
        finite = finite.float()
        if self.world.size > 1:
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        self.num_bad += 1 - finite
        self.recent.append((step, self.optimizer.param_groups[0]["lr"], finite, loss, grad_norm, places))
        return finite

    def may_update(self, finite: Tensor) -> bool:
        """Tells whether to call the optimizer; where the device decides, it is told and the answer is yes."""
        if not self.on_device:
            if not bool(finite):
                self.check()
            return bool(finite)
        stopped = (self.num_bad > self.max_skipped).float()
        self.optimizer.found_inf = torch.maximum(1 - finite, stopped)  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        return True

    def check(self) -> None:
        """Counts the bad steps and, if they are too many, dumps and raises.

        Raises:
            NonFiniteError: naming the first faulty step and the dump.
        """
        bad = [entry for entry in self.recent if not bool(entry[2])]
        self.recent = []
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise NonFiniteError(
                "the loss scale fell below 1: the gradients overflow in fp16 step after step, and nothing is learnt; use "
                "run.precision = 'bf16' or 'fp32', or set optimizer.clip_grad_norm and lower base_lr"
            )
        if not bad:
            return
        self.progress.num_skipped = int(self.num_bad)
        step, lr, _, loss, grad_norm, places = bad[0]
        told = f"loss {float(loss):g}, gradient norm {float(grad_norm):g} at step {step}"
        if self.progress.num_skipped <= self.max_skipped:
            log.warning("update left out (%d of %d allowed): %s", self.progress.num_skipped, self.max_skipped, told)
            return
        dump = self.work_dir / f"nonfinite_step_{step:08d}"
        if self.world.is_main:
            self._write_dump(dump, step, lr, float(loss), float(grad_norm), places)
        raise NonFiniteError(
            f"{told}: stopped before the update. {dump}.json says what led to it, {dump}.pt holds model and optimizer "
            "before the update. Common causes: fp16 (use run.precision = 'bf16'), too high a base_lr, no clip_grad_norm, "
            "a broken image. To go on past it: --resume with run.max_skipped_steps = 1 or more"
        )

    def _write_dump(
        self, dump: Path, step: int, lr: float, loss: float, grad_norm: float, places: list[Tensor]
    ) -> None:
        gradients = {
            name: f"{int((~torch.isfinite(p.grad)).sum())} of {p.numel()}"
            for i, group in enumerate(self.optimizer.param_groups)
            for name, p in zip(
                group.get("param_names", [f"group {i}"] * len(group["params"])), group["params"], strict=True
            )
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        }
        told = {
            "step": step,
            "loss": repr(loss),
            "gradient_norm": repr(grad_norm),
            "lr_of_first_group": lr,
            "non_finite_gradient_values": "not kept: found after the step" if self.on_device else gradients,
            "places_in_stream_of_main_process": [int(place) for several in places for place in several],
        }
        with atomic_path(dump.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(told, indent=1))
        with atomic_path(dump.with_suffix(".pt")) as temporary:
            torch.save(self.state(), temporary)
