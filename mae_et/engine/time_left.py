"""How long a run still takes, from the speed that it has shown."""

from __future__ import annotations

import time
from copy import deepcopy

from mae_et.curriculum.plan import Plan
from mae_et.engine.progress import Progress, StageStats


class TimeLeft:
    """Estimates the time to the end of a run.

    An image of a later stage takes longer to compute, in proportion to its FLOPs. To load, it takes as long as now. Where loading
    is the limit now, a step therefore takes no longer until computing becomes the limit.

    Args:
        plan: of the run.
        progress: of the run; read at each call.
    """

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.plan, self.progress = plan, progress
        self.before = deepcopy(progress.stages)  # by earlier processes of the run, perhaps on another machine
        self.first_step = progress.step
        self.start: tuple[float, float] | None = None

    def step_done(self) -> None:
        """Starts the clock at the first step. What came before, e.g. the start of the loader, happens once."""
        if self.start is None:
            self.start = time.monotonic(), self.progress.seconds

    def seconds(self) -> float | None:
        """Returns the seconds to the end; None if nothing is known yet, which is so before the first entry of metrics."""
        step, plan = self.progress.step, self.plan
        if step == 0 or self.start is None:
            return None
        current = plan.stage_at(step - 1)
        past, stats = (
            self.before.get(current.index, StageStats()),
            self.progress.stages.get(current.index, StageStats()),
        )
        num_images = stats.num_images - past.num_images
        if num_images == 0:
            return None
        per_image = (stats.seconds - past.seconds) / num_images
        computing = per_image - (stats.waiting_seconds - past.waiting_seconds) / num_images
        total = 0.0
        for stage in plan.stages[current.index :]:
            num_steps = min(stage.num_steps, stage.first_step + stage.num_steps - step)
            by_compute = computing * stage.forward_flops / current.forward_flops
            total += num_steps * stage.global_batch_size * max(by_compute, per_image)
        return total * self._overhead()

    def _overhead(self) -> float:
        """Returns the time since the first step over its part in steps; the rest went to hooks and saves."""
        assert self.start is not None
        clock, trained = self.start
        seconds = self.progress.seconds - trained
        return max(1.0, (time.monotonic() - clock) / seconds) if seconds > 0 else 1.0
