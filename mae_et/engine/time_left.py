"""How long a run still takes, from the speed that it has shown."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import replace

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
        self.baselines = deepcopy(progress.stages)  # by earlier processes of the run, perhaps on another machine
        self.in_stages: set[int] = set()  # of this process
        self.clock: tuple[float, float] | None = None

    def seconds(self) -> float | None:
        """Returns the seconds to the end, at an entry of the metrics; None if nothing is known yet.

        From the second entry of a stage on, its speed is that since the first one, which holds the start of the loader or a
        compilation.
        """
        step, plan = self.progress.step, self.plan
        if step == 0:
            return None
        current = plan.stage_at(step - 1)
        stats = self.progress.stages.get(current.index, StageStats())
        base = self.baselines.get(current.index, StageStats())
        num_images = stats.num_images - base.num_images
        if num_images == 0:
            return None
        if current.index not in self.in_stages:
            self.in_stages.add(current.index)
            self.baselines[current.index] = replace(stats)
        per_image = (stats.seconds - base.seconds) / num_images
        computing = per_image - (stats.waiting_seconds - base.waiting_seconds) / num_images
        total = 0.0
        for stage in plan.stages[current.index :]:
            num_steps = min(stage.num_steps, stage.first_step + stage.num_steps - step)
            by_compute = computing * stage.forward_flops / current.forward_flops
            total += num_steps * stage.global_batch_size * max(by_compute, per_image)
        return total * self._overhead()

    def _overhead(self) -> float:
        """Returns the time since the first entry over its part in steps; the rest went to hooks and saves."""
        now = time.monotonic(), self.progress.seconds
        if self.clock is None:
            self.clock = now
        elapsed, trained = (new - old for new, old in zip(now, self.clock, strict=True))
        return max(1.0, elapsed / trained) if trained > 0 else 1.0
