"""A budget in hours: the equivalent epochs that fit, from measured speeds. Pure, without torch.

The recipe is scaled as a whole: warm-up and baseline keep their ratios to the budget. The time of a run is that of its
images, of what runs beside the training (checkpoints, evaluation), and of what was spent before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mae_et.config.training import TrainConfig
from mae_et.curriculum.cost import ModelCost
from mae_et.curriculum.plan import Plan, make_plan
from mae_et.errors import ConfigError, UserError

TRIAL_STEPS = 2000  # of each stage, at least, in the plan that speeds are measured with
MAX_ATTEMPTS = 8  # to find such a plan
TOLERANCE = 1e-4  # relative, of the solved budget


@dataclass(frozen=True)
class StageSpeed:
    """What was measured of one stage. Speeds are images shown per second, over all processes; the slowest process decides."""

    bandwidth: int  # px
    global_batch_size: int
    images_per_second: float  # of the training, data included
    loader_images_per_second: float  # of the loader and the replay buffer alone
    step_images_per_second: float  # of the step alone, on one batch
    loader_cpu_fraction: float | None  # CPU time of the loader processes over their wall time; None: unknown
    memory_bytes: int  # peak of one process: of the GPU, or of the training process
    memory_limit: int | None  # bytes that one process could have; None: unknown


@dataclass(frozen=True)
class Measurement:
    """Speeds of all stages, and seconds of what runs beside the training."""

    device: str
    num_processes: int
    num_workers: int  # loader processes of each training process
    stages: tuple[StageSpeed, ...]
    checkpoint_seconds: float
    hook_seconds: float  # of all evaluations and pictures of the solved run
    seconds_before: float  # from the start of the command to the first step, the measurement included


def scale_budget(config: TrainConfig, equivalent_epochs: float) -> TrainConfig:
    """Returns a config with another budget in equivalent epochs, without budget_hours.

    Warm-ups and baseline are scaled with the budget.
    """
    curriculum = config.curriculum
    factor = equivalent_epochs / curriculum.equivalent_epochs
    names = [name for name in type(curriculum).model_fields if name.endswith("_equivalent_epochs")]
    scaled = {name: getattr(curriculum, name) * factor for name in names}
    scaled |= {"budget_hours": None, "equivalent_epochs": equivalent_epochs}
    return config.model_copy(update={"curriculum": curriculum.model_copy(update=scaled)})


def trial_plan(
    config: TrainConfig, cost: ModelCost, dataset_size: int, world_size: int, local_world_size: int | None = None
) -> Plan:
    """Returns a plan of the config's stages with at least TRIAL_STEPS steps each, for any budget of the config.

    Raises:
        ConfigError: as for `make_plan`, except for stages that are too short.
    """
    epochs = TRIAL_STEPS * config.batch.global_batch_size / dataset_size  # as many steps at full size
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            plan = make_plan(scale_budget(config, epochs), cost, dataset_size, world_size, local_world_size)
        except ConfigError:
            if attempt == MAX_ATTEMPTS:  # the fault is another one
                raise
            epochs *= 10
            continue
        shortest = min(stage.num_steps for stage in plan.stages)
        if shortest >= TRIAL_STEPS:
            return plan
        epochs *= 1.1 * TRIAL_STEPS / shortest
    return plan


def run_seconds(plan: Plan, stages: Sequence[StageSpeed], beside: Callable[[Plan], float]) -> float:
    """Returns the seconds from the first step to the end of a run.

    Args:
        plan: of the run.
        stages: speeds, in the order of the plan's stages.
        beside: seconds of checkpoints and evaluations of a plan.
    """
    return beside(plan) + sum(
        stage.num_images / speed.images_per_second for stage, speed in zip(plan.stages, stages, strict=True)
    )


def solve_budget(seconds_of: Callable[[float], float | None], seconds: float, spent: float) -> float:
    """Returns the largest budget whose run ends in time, in equivalent epochs with four digits.

    Args:
        seconds_of: equivalent epochs -> seconds of the training; None: too few for one step in each stage. Rising.
        seconds: of the whole budget.
        spent: of them, before the first step.
    Raises:
        UserError: if not even the shortest run ends in time; the message has the smallest hours that work.
    """
    high = 1.0
    while (time := seconds_of(high)) is None or time <= seconds - spent:
        high *= 2
    low = high
    while (time := seconds_of(low)) is not None and time > seconds - spent:
        low /= 2
    if time is None:  # the shortest run lies between `low` and 2 `low`
        shortest = _bisect(lambda epochs: seconds_of(epochs) is None, low, 2 * low)[1]
        needed = seconds_of(shortest)
        assert needed is not None
        if needed > seconds - spent:
            hours = _round_up(1.05 * (needed + spent) / 3600)
            raise UserError(
                f"curriculum.budget_hours = {seconds / 3600:.4g} is too short: {spent:.0f} s pass before the first step, and the "
                f"shortest run, one step in the shortest stage, takes {needed:.0f} s with its evaluations and checkpoints. "
                f"The smallest budget that works here is {hours:g} hours; or lower batch.global_batch_size"
            )
        low = shortest
    found = _bisect(lambda epochs: (seconds_of(epochs) or 0.0) <= seconds - spent, low, high)[0]
    rounded = _round_down(found)
    return found if seconds_of(rounded) is None else rounded


def _bisect(is_low: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Returns neighbours (below, above) of the place where `is_low` turns false, low <= below <= above <= high."""
    while high / low > 1 + TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_low(middle) else (low, middle)
    return low, high


def _round_down(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.floor(value / unit) * unit:.4g}")


def _round_up(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.3g}")
