"""Whether any process was asked to stop, found out without waiting for the device or for the other processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mae_et.engine.distributed import World
from mae_et.engine.faults import StopRequest


class StopVote:
    """Agrees on a stop request, so that all processes stop after the same step.

    After each step the vote travels in the reduce that the non-finite guard makes anyway. On a GPU the host reads the
    result of the step before, which is done by then, instead of waiting for this one: the run stops one step later.

    Args:
        request: of this process.
        world: this process among the others.
    """

    def __init__(self, request: StopRequest, world: World) -> None:
        self.request, self.world = request, world
        self.result: tuple[Tensor, Any] | None = (
            None  # 0 if a process wants to stop; the event after which it can be read
        )
        self.asked: tuple[Tensor, Any] | None = None
        self.is_passed = False

    @property
    def ballot(self) -> float:
        """Returns this process's part of the reduce (minimum) after a step: 0 to stop, else 1."""
        return float(not self.request())

    def count(self, result: Tensor) -> None:
        """Takes the reduced ballots of a step, on the device."""
        before, event = self.result, None
        if result.device.type == "cuda":
            result = result.to("cpu", non_blocking=True)  # pinned memory
            event = torch.cuda.Event()
            event.record()
        self.result = (result, event)
        seen = self.result if event is None else before
        if seen is not None:
            if seen[1] is not None:
                seen[1].synchronize()
            self.is_passed = not bool(seen[0])

    def passed(self) -> bool:
        """Returns whether to stop after this step; the same in all processes."""
        return self.request() if self.world.size == 1 else self.is_passed

    def passed_between(self) -> bool:
        """Returns whether to give up a step between its micro batches; the same in all processes.

        With several processes the answer is that to the question before, and the next question travels on the host while
        the device works.
        """
        if self.world.control is None:
            return self.request()
        before, ballot = self.asked, torch.tensor(int(self.request()))
        self.asked = ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.world.control, async_op=True)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])
