"""Keeps NaN and infinity out of the parameters: a run stops BEFORE the update of a non-finite step.

On a CPU the host checks each step. On a GPU that would make the host wait for the device at every step. There the fused
optimizer gets a flag on the device and skips the update, and all later updates once more steps were non-finite than
`max_skipped` allows. The host finds out at the next log or save; the parameters are still those before the faulty update.
The host also checks each step on a GPU if the optimizer is not fused (LARS) or a loss scaler is active (fp16).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mae_et.engine.distributed import World
from mae_et.engine.parallel import local
from mae_et.engine.progress import Progress
from mae_et.engine.stop_vote import StopVote
from mae_et.errors import NonFiniteError
from mae_et.storage.atomic import atomic_path

log = logging.getLogger(__name__)


@dataclass
class CheckedStep:
    """What the guard keeps of a step until the host looks at it."""

    step: int
    lr: float  # of the first parameter group
    finite: Tensor  # 1.0 or 0.0, on the device
    loss: Tensor
    grad_norm: Tensor
    places: list[Tensor]  # in the stream, of each micro batch of this process


class NonFiniteGuard:
    """Checks the loss and the gradient norm of each step.

    Args:
        optimizer: gets the flag on the device if it is fused and on a GPU.
        world: a step that is non-finite in one process counts as non-finite in all.
        scaler: under a loss scale, infinite gradients are the scaler's task (it skips the update and lowers the scale)
            until the scale falls below 1.
        progress: its `num_skipped` is updated.
        max_skipped: steps that may be skipped before the run stops.
        on_device: whether the device decides; None: on a GPU where that is possible.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        world: World,
        scaler: torch.amp.GradScaler,
        progress: Progress,
        max_skipped: int,
        on_device: bool | None = None,
    ) -> None:
        self.optimizer, self.world, self.scaler = optimizer, world, scaler
        self.progress, self.max_skipped = progress, max_skipped
        on_device = world.device.type == "cuda" if on_device is None else on_device
        self.on_device = on_device and bool(optimizer.defaults.get("fused")) and not scaler.is_enabled()
        self.num_bad = torch.full((), float(progress.num_skipped), device=world.device)
        self.recent: list[CheckedStep] = []  # since the last `faulty_step`

    def look(self, step: int, loss: Tensor, grad_norm: Tensor, places: list[Tensor], stop: StopVote) -> Tensor:
        """Records a step, and counts the votes of the processes to stop, in one reduce.

        Returns:
            1.0 if the step is finite in all processes, else 0.0, on the device.
        """
        finite = torch.isfinite(loss)
        if not self.scaler.is_enabled():
            finite = finite & torch.isfinite(grad_norm)
        finite = finite.float()
        if self.world.size > 1:
            both = torch.stack([finite, torch.full_like(finite, stop.ballot)])
            dist.all_reduce(both, dist.ReduceOp.MIN)
            finite = both[0]
            stop.count(both[1])
        self.num_bad += 1 - finite
        lr = self.optimizer.param_groups[0]["lr"]
        self.recent.append(CheckedStep(step, lr, finite, loss, grad_norm, places))
        return finite

    def may_update(self, finite: Tensor) -> bool:
        """Returns whether to call the optimizer. Where the device decides, it gets the flag and the answer is True."""
        if not self.on_device:
            return bool(finite)
        stopped = (self.num_bad > self.max_skipped).float()
        self.optimizer.found_inf = torch.maximum(1 - finite, stopped)  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        return True

    def faulty_step(self) -> CheckedStep | None:
        """Counts the non-finite steps since the last call. The host waits for the device here.

        Returns:
            The first of them if more were skipped than allowed, else None.
        Raises:
            NonFiniteError: if the loss scale fell below 1.
        """
        bad = [entry for entry in self.recent if not bool(entry.finite)]
        self.recent = []
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise NonFiniteError(
                "the loss scale fell below 1: the gradients overflow in fp16 at every step and nothing is learned. Use "
                "run.precision = 'bf16' or 'fp32', or set optimizer.clip_grad_norm and lower base_lr"
            )
        if not bad:
            return None
        self.progress.num_skipped = int(self.num_bad)
        if self.progress.num_skipped > self.max_skipped:
            return bad[0]
        for entry in bad:
            log.warning(
                "update skipped: %s (%d of %d allowed)", _describe(entry), self.progress.num_skipped, self.max_skipped
            )
        return None


def stop_at(
    faulty: CheckedStep, optimizer: torch.optim.Optimizer, dump: Callable[[Path], str], folder: Path, is_main: bool
) -> None:
    """Writes what led to a non-finite step and raises. All processes take part.

    Args:
        faulty: the step.
        optimizer: its gradients are counted where they still exist.
        dump: writes what a checkpoint would hold to a path without a suffix, and returns the name that it gave it. Model and
            optimizer are those before the faulty update.
        folder: gets `nonfinite_step_XXXXXXXX.json` and the dump.
        is_main: whether this process writes the description.
    Raises:
        NonFiniteError: naming the step and the files.
    """
    name = f"nonfinite_step_{faulty.step:08d}"
    if is_main:
        _describe_in_file(folder / f"{name}.json", faulty, optimizer)
    dumped = dump(folder / name)
    raise NonFiniteError(
        f"{_describe(faulty)}: stopped before the update. In the run folder {name}.json describes the step, {dumped} holds "
        "model and optimizer before the update. Common causes: fp16 (use run.precision = 'bf16'), base_lr too high, no "
        "optimizer.clip_grad_norm, a broken image. To skip the step: --resume with run.max_skipped_steps = 1 or more"
    )


def _describe(entry: CheckedStep) -> str:
    return f"loss {float(entry.loss):g}, gradient norm {float(entry.grad_norm):g} at step {entry.step}"


def _describe_in_file(path: Path, faulty: CheckedStep, optimizer: torch.optim.Optimizer) -> None:
    has_gradients = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
    gradients = {
        name: f"{int((~torch.isfinite(local(parameter.grad))).sum())} of {local(parameter.grad).numel()}"
        for group in optimizer.param_groups
        for name, parameter in zip(
            group.get("param_names", ["unnamed"] * len(group["params"])), group["params"], strict=True
        )
        if parameter.grad is not None and not bool(torch.isfinite(local(parameter.grad)).all())
    }
    values = {
        "step": faulty.step,
        "loss": repr(float(faulty.loss)),
        "gradient_norm": repr(float(faulty.grad_norm)),
        "lr_of_first_group": faulty.lr,
        "non_finite_gradient_values": gradients if has_gradients else "not available: found after the step",
        "places_in_stream_of_main_process": [int(place) for several in faulty.places for place in several],
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1))
