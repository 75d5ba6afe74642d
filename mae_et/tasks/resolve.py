"""What a run decides at its first start and keeps when it is resumed: the precision, and the budget that fits its hours."""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from mae_et.config.schema import TrainConfig
from mae_et.config.section import check_faults
from mae_et.curriculum.cost import ModelCost
from mae_et.curriculum.hours import Measurement, run_seconds, scale_budget, solve_budget, trial_plan
from mae_et.curriculum.limits import binding_limits
from mae_et.curriculum.plan import Plan, make_plan
from mae_et.data.replay import check_memory
from mae_et.data.stream import choose_num_workers
from mae_et.engine.distributed import World, join_world
from mae_et.engine.hardware import available_memory
from mae_et.engine.measure import measure_checkpoint, measure_hooks, measure_stages
from mae_et.engine.precision import choose_precision
from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.process import available_cores
from mae_et.runs.folder import read_resolved, refuse_used
from mae_et.runs.records import Resolved

if TYPE_CHECKING:
    from mae_et.tasks.run import TaskData, TrainingTask

log = logging.getLogger(__name__)

AnyConfig = TypeVar("AnyConfig", bound=TrainConfig)

SECONDS = (20.0, 90.0)  # limits of the time for measuring stages
SHARE = 0.05  # of the budget for it, within these limits


def resolve(
    task_type: type[TrainingTask],
    config: TrainConfig,
    data: TaskData,
    world: World,
    work_dir: Path,
    resume: bool,
    start: float,
) -> tuple[TrainConfig, Resolved]:
    """Replaces run.precision = "auto" and curriculum.budget_hours by what they mean for this run.

    A resumed run takes both from plan.json. A new run chooses the precision for its device, and measures.

    Args:
        task_type: what is trained.
        config: as checked.
        data: of the run.
        world: this process among the others.
        work_dir: the run folder.
        resume: whether the run there may be continued.
        start: of the command, by time.perf_counter(); the hours count from here.
    Returns:
        The config with a precision and without budget_hours, and what plan.json stores. The same in all processes.
    Raises:
        UserError: if the hours are too few; the message has the smallest that work.
        CheckpointError: if a resumed run has other hours than before, or its plan.json is gone.
    """
    refuse_used(work_dir, resume)
    hours = config.curriculum.budget_hours
    needed = hours is not None or config.run.precision == "auto"
    stored = read_resolved(work_dir, world, needed) if resume else None
    config = with_precision(config, world.device, stored)
    if hours is None:
        return config, stored or Resolved(precision=config.run.precision)
    if stored is not None:
        if stored.budget_hours != hours or stored.equivalent_epochs is None:
            raise CheckpointError(
                f"{work_dir} was started with curriculum.budget_hours = {stored.budget_hours}, not {hours:g}: undo the change to "
                "resume, or start a new run in another --work-dir"
            )
        return scale_budget(config, stored.equivalent_epochs), stored
    work_dir.parent.mkdir(parents=True, exist_ok=True)  # checkpoints are measured on the disk of the run
    found, seconds_of = measure(task_type, config, data, world, work_dir.parent, hours * 3600)
    solved, resolved = solve(config, world, found, seconds_of, hours, start)
    if resolved.equivalent_epochs is not None:
        for line in binding_limits(solved, seconds_of.plan(resolved.equivalent_epochs), found, available_cores()):
            log.info("%s", line)
    return solved, resolved


def with_precision(config: AnyConfig, device: torch.device, stored: Resolved | None = None) -> AnyConfig:
    """Replaces run.precision = "auto" by the precision of the run's first start, or by the device's for a new run."""
    if config.run.precision != "auto":
        return config
    chosen = choose_precision(device)
    if stored is not None and stored.precision != chosen:
        log.warning(
            "run.precision = 'auto' would be %r on this device; the run was started with %r and keeps it",
            chosen,
            stored.precision,
        )
    precision = chosen if stored is None else stored.precision
    log.info("run.precision = 'auto' is %r on %s", precision, device.type)
    return config.model_copy(update={"run": config.run.model_copy(update={"precision": precision})})


def measure_plan(
    task_type: type[TrainingTask], config: TrainConfig, device: str | None
) -> tuple[Plan, Measurement, list[str]]:
    """Measures a run before it is started.

    Args:
        task_type: what would be trained.
        config: as checked; with curriculum.budget_hours the plan has the budget that fits.
        device: "cpu" or "cuda"; None: CUDA where available.
    Returns:
        The plan, the measurement, and for each stage a sentence on its limit.
    Raises:
        UserError: if this is one of several processes, or the hours are too few.
    """
    start = time.perf_counter()
    with join_world(device) as world:
        if world.size > 1:
            raise UserError("the plan is measured with one process: start it without torchrun")
        data = task_type.open_data(config)
        config = with_precision(config, world.device)
        hours = config.curriculum.budget_hours
        budget = math.inf if hours is None else hours * 3600
        found, seconds_of = measure(task_type, config, data, world, Path(tempfile.gettempdir()), budget)
        if hours is not None:
            config, resolved = solve(config, world, found, seconds_of, hours, start)
            assert resolved.measurement is not None
            found = resolved.measurement
        plan = make_plan(config, task_type.cost(config), len(data.train))
        if hours is None:
            found = dataclasses.replace(found, hook_seconds=seconds_of.hooks(plan))
        return plan, found, binding_limits(config, plan, found, available_cores())


class SecondsOf:
    """Seconds of the training with a budget, from a measurement.

    Args:
        config, cost, sizes: arguments of `make_plan`.
        longest: the plan of the measurement, in which no stage is too short.
        found: the measurement.
        task: with the hooks of the run.
        hook_seconds: of one call of each hook.
    """

    def __init__(
        self,
        config: TrainConfig,
        cost: ModelCost,
        sizes: tuple[int, int, int],
        longest: Plan,
        found: Measurement,
        task: TrainingTask,
        hook_seconds: list[float],
    ) -> None:
        self.config, self.cost, self.sizes, self.longest = config, cost, sizes, longest
        self.found, self.task, self.seconds = found, task, hook_seconds

    def __call__(self, equivalent_epochs: float) -> float | None:
        try:
            plan = self.plan(equivalent_epochs)
        except ConfigError:
            if equivalent_epochs >= self.longest.equivalent_epochs:
                raise
            return None
        return run_seconds(plan, self.found.stages, self.beside)

    def plan(self, equivalent_epochs: float) -> Plan:
        return make_plan(scale_budget(self.config, equivalent_epochs), self.cost, *self.sizes)

    def beside(self, plan: Plan) -> float:
        """Returns the seconds of the checkpoints, the results and the hooks of a plan."""
        num_saves = plan.num_steps // self.config.run.save_interval + 2  # at the end, and the result files
        return num_saves * self.found.checkpoint_seconds + self.hooks(plan)

    def hooks(self, plan: Plan) -> float:
        self.task.plan = plan  # type: ignore[attr-defined]
        steps = range(plan.num_steps + 1)
        calls = [sum(hook.due(step) for step in steps) for hook in self.task.hooks]
        return sum(num * seconds for num, seconds in zip(calls, self.seconds, strict=True))


def measure(
    task_type: type[TrainingTask], config: TrainConfig, data: TaskData, world: World, folder: Path, budget: float
) -> tuple[Measurement, SecondsOf]:
    """Measures a task of its own, with real data, in a temporary folder. All processes take part.

    Args:
        task_type, config, data, world: as for `resolve`; the precision is resolved.
        folder: gets the temporary folder.
        budget: seconds of the run, which bound the time for measuring.
    """
    from mae_et.tasks.run import make_trainer

    cost, sizes = task_type.cost(config), (len(data.train), world.size, world.local_size)
    plan = trial_plan(config, cost, *sizes)
    check_memory(plan, available_memory())
    still = tuple(dataclasses.replace(stage, lr=0.0) for stage in plan.stages)  # random weights stay finite
    seconds = min(max(SHARE * budget, SECONDS[0]), SECONDS[1])
    log.info("measuring the speed of %d stages for about %.0f s", len(plan.stages), seconds)
    num_workers = choose_num_workers(config.data.num_workers, world.local_size, world.device.type == "cuda")
    with tempfile.TemporaryDirectory(prefix=".measuring-", dir=folder) as temporary:
        still_plan = dataclasses.replace(plan, stages=still, min_lr=0.0)
        task = task_type(config, data, still_plan, world, Path(temporary))
        trainer = make_trainer(config, task, data.train, still_plan, {})
        with trainer.outputs():
            hooks = measure_hooks(trainer)  # at the first stage: there a supervised training evaluates at two sizes
            stages = measure_stages(trainer, num_workers, seconds)
            checkpoint = measure_checkpoint(trainer)
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    found = Measurement(device, world.size, num_workers, stages, checkpoint, 0.0, 0.0)
    task.model.cpu()  # the run builds its own; the task stays for its hooks' schedule
    del trainer, task.optimizer
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return found, SecondsOf(config, cost, sizes, plan, found, task, hooks)


def solve(
    config: TrainConfig, world: World, found: Measurement, seconds_of: SecondsOf, hours: float, start: float
) -> tuple[TrainConfig, Resolved]:
    """Returns the config with the budget that fits the hours, and what plan.json stores. The main process decides.

    Args:
        config, world, start: as for `resolve`.
        found, seconds_of: as from `measure`.
        hours: from `start` to the end of the run.
    """
    fault = resolved = None
    if world.is_main:
        # What follows until the first step was done once for the measurement: building the model, opening the stream.
        spent = time.perf_counter() - start
        try:
            epochs = solve_budget(seconds_of, hours * 3600, spent)
        except UserError as error:
            fault = str(error)
        else:
            plan = seconds_of.plan(epochs)
            found = dataclasses.replace(found, hook_seconds=seconds_of.hooks(plan), seconds_before=spent)
            resolved = Resolved(
                precision=config.run.precision,
                budget_hours=hours,
                equivalent_epochs=epochs,
                planned_seconds=spent + run_seconds(plan, found.stages, seconds_of.beside),
                measurement=found,
            )
    fault, resolved = world.gather((fault, resolved))[0]
    if fault is not None:
        raise UserError(fault)
    assert resolved is not None
    asked = config.curriculum.equivalent_epochs
    config = scale_budget(config, resolved.equivalent_epochs)
    if faults := list(check_faults(config)):  # a drop path that grows with the budget
        raise ConfigError(faults, f"curriculum.budget_hours = {hours:g}")
    log.info(
        "curriculum.budget_hours = %g: %.4g equivalent epochs fit (the recipe has %g; warm-up and baseline are scaled with it)",
        hours, resolved.equivalent_epochs, asked,
    )  # fmt: skip
    return config, resolved
