"""Measures the stages of a training on the device at hand: the loader alone, the step alone, both, checkpoints and hooks."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from mae_et.curriculum.hours import TRIAL_STEPS, StageSpeed
from mae_et.curriculum.plan import PlannedStage
from mae_et.data.stream import Batch
from mae_et.engine.distributed import World
from mae_et.engine.faults import StopRequest
from mae_et.engine.hardware import available_memory, process_memory
from mae_et.engine.stop_vote import StopVote
from mae_et.engine.trainer import Trainer
from mae_et.errors import DataError

SHARES = {"step": 0.2, "loader": 0.2, "both": 0.6}  # of the time for a stage
NO_STOP = StopRequest()


def measure_stages(trainer: Trainer, num_workers: int, seconds: float) -> tuple[StageSpeed, ...]:
    """Measures the speed of each stage of a trainer's plan. All processes take part and get the same numbers.

    The trainer's weights, progress and random state are of no use afterwards.

    Args:
        trainer: of a plan from `trial_plan`, inside `trainer.outputs()`.
        num_workers: loader processes of each training process.
        seconds: for all stages together, about. Each stage takes at least a few steps.
    """
    share = seconds / len(trainer.plan.stages)
    return tuple(_measure_stage(trainer, stage, num_workers, share) for stage in trainer.plan.stages)


def measure_checkpoint(trainer: Trainer) -> float:
    """Returns the seconds of one checkpoint, until it is on disk."""

    def save() -> None:
        trainer.save()
        trainer.checkpoints.wait()

    return _slowest(trainer.world, _seconds(save))


def measure_hooks(trainer: Trainer) -> list[float]:
    """Returns the seconds of one call of each of this process's hooks, at the first step."""
    with trainer.parallel.evaluation():
        trainer.task.model.eval()
        times = [_seconds(lambda hook=hook: hook(0, trainer.log.writer)) for hook in trainer.task.hooks]  # type: ignore[misc]
        trainer.task.model.train()
    return times


def _measure_stage(trainer: Trainer, stage: PlannedStage, num_workers: int, seconds: float) -> StageSpeed:
    world, first = trainer.world, stage.first_step
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)

    def train(batches: Iterator[Batch]) -> None:
        trainer.train_step(batches, StopVote(NO_STOP, world))
        trainer.progress.step += 1

    with trainer.stream.open(first, NO_STOP) as batches:
        trainer.progress.step = first
        held = list(itertools.islice(batches, stage.accum_steps))
    if any(len(batch.images) < stage.micro_batch_size for batch in held):
        raise DataError(f"the training images cannot be read: {held[0].bad_images[0].reason}")

    def train_on_held() -> None:
        trainer.progress.step = first
        train(iter(held))

    step_seconds = _time(train_on_held, seconds * SHARES["step"], world)

    # Replay takes whole batches in turns: a window holds whole turns.
    turn = stage.replay.factor if stage.replay.mode == "alternate" else 1
    # The first batches of all loader processes come at once.
    first_steps = turn * math.ceil((1 + num_workers / stage.accum_steps) / turn)
    with trainer.stream.open(first, NO_STOP) as batches:
        clock = _WorkerClock(num_workers)

        def load() -> None:
            for _ in range(stage.accum_steps):
                next(batches)

        loader_seconds = _time(load, seconds * SHARES["loader"], world, first_steps, turn)
        cpu_fraction = clock.cpu_fraction()
    with trainer.stream.open(first, NO_STOP) as batches:
        trainer.progress.step = first
        both_seconds = _time(lambda: train(batches), seconds * SHARES["both"], world, first_steps, turn)

    images, (used, limit) = stage.global_batch_size, _memory(world)
    return StageSpeed(
        bandwidth=stage.bandwidth,
        global_batch_size=images,
        images_per_second=images / both_seconds,
        loader_images_per_second=images / loader_seconds,
        step_images_per_second=images / step_seconds,
        loader_cpu_fraction=cpu_fraction,
        memory_bytes=used,
        memory_limit=limit,
    )


def _time(take: Callable[[], object], seconds: float, world: World, first: int = 1, unit: int = 1) -> float:
    """Returns the mean seconds of a call on the slowest process.

    Args:
        take: is called the same number of times in each process.
        seconds: for all calls, about.
        world: this process among the others.
        first: calls that are not counted.
        unit: the counted calls are a multiple of it.
    """
    for _ in range(first):
        take()
    once = _slowest(world, _seconds(lambda: [take() for _ in range(unit)], world))
    most = (TRIAL_STEPS - first) // unit - 1
    num = min(most, max(1, round((seconds - once) / once)))
    more = _slowest(world, _seconds(lambda: [take() for _ in range(num * unit)], world))
    return (once + more) / ((1 + num) * unit)


def _seconds(call: Callable[[], object], world: World | None = None) -> float:
    start = time.perf_counter()
    call()
    if world is not None and world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter() - start


def _slowest(world: World, seconds: float) -> float:
    return max(world.gather(seconds))


def _memory(world: World) -> tuple[int, int | None]:
    """Returns the peak of one process in bytes and its limit; on a CPU the processes share the free memory."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device), torch.cuda.mem_get_info(world.device)[1]
    free = available_memory()
    limit = None if free is None else process_memory("VmRSS") + free // world.local_size
    return process_memory("VmHWM"), limit


class _WorkerClock:
    """Reads how much CPU time the loader processes that run now take, where Linux tells it."""

    def __init__(self, num_workers: int) -> None:
        children: Sequence = multiprocessing.active_children() if num_workers else []
        self.pids = [child.pid for child in children]
        self.start, self.cpu = time.perf_counter(), self._cpu_seconds()

    def cpu_fraction(self) -> float | None:
        """Returns their CPU time over their wall time since the start; None: unknown, or none run."""
        now = self._cpu_seconds()
        if not self.pids or now is None or self.cpu is None:
            return None
        return (now - self.cpu) / ((time.perf_counter() - self.start) * len(self.pids))

    def _cpu_seconds(self) -> float | None:
        try:
            stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.pids]
        except OSError:
            return None
        return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")
