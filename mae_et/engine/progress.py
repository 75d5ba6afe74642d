"""How far a run is, and the clock of its stages.

`Progress` is what a checkpoint holds besides the model, the optimizer and the loss scale. `Meter` adds up what the steps
report and moves it into the progress.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mae_et.curriculum.plan import PlannedStage
from mae_et.engine.distributed import World


@dataclass
class StageStats:
    """Where the time of a stage went. Hooks and saves are not counted."""

    num_images: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0  # of them, for the loader


@dataclass
class Progress:
    """How far the run is."""

    step: int = 0  # steps done
    sums: dict[str, float] = field(default_factory=dict)  # of the logged scalars since the last entry
    weight: float = 0.0  # steps in these sums
    stages: dict[int, StageStats] = field(default_factory=dict)
    bad_images: dict[int, str] = field(default_factory=dict)  # index -> reason
    num_skipped: int = 0  # steps with a non-finite loss or gradient
    refilled_images: int = 0  # read again for the replay buffer after a stop, over all processes
    refill_seconds: float = 0.0
    lost_entries: dict[str, int] = field(default_factory=dict)  # that a logger did not take

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Progress:
        stages = {index: StageStats(**stage) for index, stage in values["stages"].items()}
        return cls(**{**values, "stages": stages})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Meter:
    """Adds up the scalars of the steps on the device. Reading them makes the host wait, so it happens only on request."""

    def __init__(self, progress: Progress, world: World) -> None:
        self.progress, self.world = progress, world
        self.sums: dict[str, Tensor] = {}
        self.weight = torch.zeros((), device=world.device)
        self.open: dict[int, StageStats] = {}  # since the last `flush`
        self.waited = 0.0
        self.clock = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside the block as a wait for the loader."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, values: Mapping[str, Tensor], finite: Tensor, stage: PlannedStage) -> None:
        """Adds the scalars of a step. Those of a non-finite step are left out."""
        self.weight += finite
        for name, value in values.items():
            # float64 adds single-precision values without rounding, so a stop in between changes no digit.
            self.sums[name] = self.sums.get(name, 0) + torch.where(finite.bool() & value.isfinite(), value, 0).double()
        stats = self.open.setdefault(stage.index, StageStats())
        stats.num_images += stage.global_batch_size

    def flush(self) -> float:
        """Moves everything into the progress. Returns images/s since the last flush, over all processes."""
        progress = self.progress
        for name, total in self.sums.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + float(total)  # waits for the device
        progress.weight += float(self.weight)
        self.sums, self.weight = {}, torch.zeros_like(self.weight)
        now = time.perf_counter()
        num_images = sum(stats.num_images for stats in self.open.values())
        elapsed = now - self.clock
        for index, stats in self.open.items():  # nearly always one
            share = stats.num_images / num_images
            total_stats = progress.stages.setdefault(index, StageStats())
            total_stats.num_images += stats.num_images
            total_stats.seconds += elapsed * share
            total_stats.waiting_seconds += self.waited * share
        self.open, self.waited, self.clock = {}, 0.0, now
        return num_images / elapsed if num_images else 0.0

    def take_means(self) -> dict[str, float | None]:
        """Returns the means since the last entry, over the steps and the processes, and resets them.

        A mean is None if every step since then was non-finite.
        """
        progress = self.progress
        names = list(progress.sums)
        weight = progress.weight or float("nan")
        means = torch.tensor([progress.sums[name] / weight for name in names], dtype=torch.float64)
        if self.world.size > 1:
            means = self.world.mean(means.to(self.world.device, torch.float32)).cpu()
        progress.sums, progress.weight = {}, 0.0
        finite = [None if value != value else value for value in means.tolist()]
        return dict(zip(names, finite, strict=True))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside the block out of the training time. Waits first for the steps still on the device."""
        self._wait_for_device()
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def _wait_for_device(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
