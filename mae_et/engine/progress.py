"""What the loop shows while it runs: sums of the logged scalars, the clock of each stage, the progress bar."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.engine.distributed import World

log = logging.getLogger(__name__)


@dataclass
class StageStats:
    """Where a stage's time went. Hooks and saves are not in it."""

    num_images: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0  # of them, for the loader


@dataclass
class Progress:
    """How far the run is: what a checkpoint holds besides model, optimizer and loss scale."""

    step: int = 0  # steps done
    sums: dict[str, float] = field(default_factory=dict)  # of the logged scalars since the last entry
    weight: float = 0.0  # steps in these sums
    stages: dict[int, StageStats] = field(default_factory=dict)
    bad_images: dict[int, str] = field(default_factory=dict)  # index -> reason
    num_skipped: int = 0  # steps with a non-finite loss or gradient
    refilled_images: int = 0  # read again for the replay buffer after a stop, over all processes
    refill_seconds: float = 0.0

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
    """Adds up what the steps report, on the device, and reads it only when asked: reading makes the host wait."""

    def __init__(self, progress: Progress, world: World) -> None:
        self.progress, self.world = progress, world
        self.sums: dict[str, Tensor] = {}
        self.weight = torch.zeros((), device=world.device)
        self.open: dict[int, StageStats] = {}  # since the last `flush`
        self.waited = 0.0
        self.clock = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Times a wait for the loader."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, values: Mapping[str, Tensor], finite: Tensor, stage: PlannedStage) -> None:
        """Adds a step's scalars, unless it was a non-finite one."""
        self.weight += finite
        for name, value in values.items():
            # float64 adds single-precision values without rounding, so that a stop in between changes no digit
            self.sums[name] = self.sums.get(name, 0) + torch.where(finite.bool() & value.isfinite(), value, 0).double()
        stats = self.open.setdefault(stage.index, StageStats())
        stats.num_images += stage.global_batch_size

    def flush(self) -> float:
        """Moves everything into the progress; returns the images a second since the last flush, over all processes."""
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

    def take_means(self) -> dict[str, float]:
        """Returns the means since the last entry, over the steps and the processes, and starts anew."""
        progress = self.progress
        names = list(progress.sums)
        weight = progress.weight or float("nan")
        means = torch.tensor([progress.sums[name] / weight for name in names], dtype=torch.float64)
        if self.world.size > 1:
            means = self.world.mean(means.to(self.world.device, torch.float32)).cpu()
        progress.sums, progress.weight = {}, 0.0
        return dict(zip(names, means.tolist(), strict=True))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what is done beside the training, once the device is done with the training before it."""
        self._wait_for_device()
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def _wait_for_device(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)


class Bar:
    """The progress bar, in units of compute, so that the time left holds across stages. Without a terminal: log lines."""

    def __init__(self, plan: Plan, step: int, hidden: bool) -> None:
        self.plan = plan
        self.bar = tqdm(
            total=100.0,
            initial=100 * plan.compute_fraction(step),
            disable=True if hidden else None,  # None: only on a terminal
            bar_format="{desc}{percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}",
            dynamic_ncols=True,
        )
        self.prints = not hidden and self.bar.disable
        self.last_print = 0.0
        self.notes: dict[str, float] = {}

    def note(self, values: Mapping[str, float]) -> None:
        """Shows a hook's numbers from now on."""
        self.notes.update({name.replace("/", " "): value for name, value in values.items()})

    def show(self, entry: Mapping[str, Any]) -> None:
        """Shows a metrics entry."""
        stage = self.plan.stages[entry["stage"]]
        facts = [
            f"loss {entry['loss']:.4f}",
            f"lr {entry['lr']:.2e}",
            f"{entry['images_per_second']:.0f} img/s",
            *(f"{name} {value:.3g}" for name, value in self.notes.items()),
        ]
        head = f"stage {stage.index + 1}/{len(self.plan.stages)} bandwidth {stage.bandwidth}"
        self.bar.set_description_str(head + " ")
        self.bar.set_postfix_str(", ".join(facts))
        is_last = entry["step"] == self.plan.num_steps
        if self.prints and (is_last or time.monotonic() - self.last_print > 5):
            self.last_print = time.monotonic()
            done = 100 * entry["compute_fraction"]
            log.info("%5.1f%%  %s  step %d/%d  %s", done, head, entry["step"], self.plan.num_steps, "  ".join(facts))

    def advance(self, step: int) -> None:
        if not self.bar.disable:
            self.bar.update(100 * self.plan.compute_fraction(step) - self.bar.n)

    def close(self) -> None:
        self.bar.close()
