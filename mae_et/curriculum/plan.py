"""The curriculum: config -> Plan, stage by stage. Pure, without torch. The one home of "equivalent epochs".

Units. One *equivalent epoch* is the compute of one pass over the data at full image size. By area (the paper's count) an
image at bandwidth B costs (B / image_size)^2 of one at full size, so a fraction f of a budget of E equivalent epochs is
f * E * (image_size / B)^2 real passes over the data. The bandwidth of a rectangle is that of its shorter side, and the
ratio of the areas takes the place of the square. The *compute fraction* is the part of the budget that is done; learning
rate and augmentation strength are functions of it, so they do not depend on where the stages lie.

A plan stores what was decided: integers, learning rates, fractions. What follows from those is a property.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from mae_et.config.training import StageConfig, TrainConfig
from mae_et.curriculum.batch import (
    device_limits,
    micro_batch,
    micro_batch_faults,
    stage_batch,
    too_large_fault,
    undivided_fault,
)
from mae_et.curriculum.cost import ModelCost
from mae_et.curriculum.presets import curriculum_rows, strength_starts
from mae_et.curriculum.replay import StageReplay, plan_replay, unused_rows
from mae_et.errors import ConfigError
from mae_et.models.sizes import Size, area_ratio, plain_size, size_at, size_text

FEW_STEPS = 1000  # a plan with fewer steps gets a note


@dataclass(frozen=True)
class PlannedStage:
    """One stage. FLOPs count multiplications and additions of the forward pass of one image."""

    index: int
    bandwidth: int  # px, of the shorter side
    input_size: Size  # px, of the stage's images; the longer side follows by `size_at`
    image_size: Size  # px, of the run
    dataset_size: int
    num_steps: int
    first_step: int
    first_image: int  # position in the stream of fresh images
    global_batch_size: int
    micro_batch_size: int
    accum_steps: int
    lr: float  # absolute, at the top of the schedule
    compute_fraction: float  # of the budget, by area
    replay: StageReplay
    num_patches: int  # 0: the model has none
    num_visible: int
    forward_flops: int
    row_ends: tuple[int, ...]  # steps of the run after which the curriculum's rows of this stage are done

    @property
    def num_images(self) -> int:
        """Images shown in this stage, repeats counted."""
        return self.num_steps * self.global_batch_size

    @property
    def num_fresh_images(self) -> int:
        """Images shown that the loader prepares; the others come from the replay buffer."""
        num_processes = self.global_batch_size // self.replay.local_batch
        return self.replay.fresh_before(self.num_steps) * num_processes

    @property
    def full_size_images(self) -> float:
        """Images at full size that cost, by area, as much as this stage."""
        return self.num_steps * (self.global_batch_size * self.area_fraction)

    @property
    def area_fraction(self) -> float:
        """Area of the stage's images over that at full size."""
        return area_ratio(self.input_size, self.image_size)

    @property
    def equivalent_epochs(self) -> float:
        """Compute in passes over the data at full size, by area."""
        return self.full_size_images / self.dataset_size

    @property
    def real_epochs(self) -> float:
        """Images shown over those of the data set."""
        return self.num_images / self.dataset_size

    @property
    def fresh_epochs(self) -> float:
        """Images read over those of the data set."""
        return self.num_fresh_images / self.dataset_size

    @property
    def gflops_per_image(self) -> float:
        return self.forward_flops / 1e9


@dataclass(frozen=True)
class Plan:
    """What a config means for a data set and a number of processes. See `make_plan`."""

    equivalent_epochs: float  # as asked
    baseline_equivalent_epochs: float
    dataset_size: int
    world_size: int
    local_world_size: int  # processes that share a machine and its memory
    image_size: Size  # px
    full_size_flops: int  # forward FLOPs of one image at full size
    backward_factor: int  # FLOPs of a training step over those of its forward pass
    warmup_fraction: float
    min_lr: float
    strengths: tuple[tuple[float, float], ...]  # (from this compute fraction on, strength); empty: strength = fraction
    notes: tuple[str, ...]
    stages: tuple[PlannedStage, ...]

    @property
    def num_steps(self) -> int:
        return self.stages[-1].first_step + self.stages[-1].num_steps

    @property
    def num_images(self) -> int:
        """Images shown, repeats counted."""
        return sum(stage.num_images for stage in self.stages)

    @property
    def num_fresh_images(self) -> int:
        """Images shown that the loader prepares."""
        return self.stages[-1].first_image + self.stages[-1].num_fresh_images

    @property
    def real_epochs(self) -> float:
        return self.num_images / self.dataset_size

    @property
    def fresh_epochs(self) -> float:
        return self.num_fresh_images / self.dataset_size

    @property
    def planned_equivalent_epochs(self) -> float:
        """What the integer steps add up to, by area."""
        return sum(stage.full_size_images for stage in self.stages) / self.dataset_size

    @property
    def forward_flops(self) -> int:
        """Forward FLOPs of the whole run."""
        return sum(stage.num_images * stage.forward_flops for stage in self.stages)

    @property
    def equivalent_epochs_flops(self) -> float:
        """Equivalent epochs by counted FLOPs."""
        return self.forward_flops / (self.dataset_size * self.full_size_flops)

    @property
    def nominal_speedup(self) -> float:
        """Baseline over budget, by area: the paper's count."""
        return self.baseline_equivalent_epochs / self.equivalent_epochs

    @property
    def nominal_speedup_flops(self) -> float:
        """Baseline over budget by counted FLOPs."""
        return self.baseline_equivalent_epochs / self.equivalent_epochs_flops

    @property
    def train_petaflops(self) -> float:
        """FLOPs of the whole run, backward passes included, in 1e15."""
        return self.backward_factor * self.forward_flops / 1e15

    @property
    def replay_bytes(self) -> int:
        """Bytes of one process: those of the largest buffer, because only one stage's buffer is held at a time."""
        return max(stage.replay.buffer_bytes for stage in self.stages)

    def flops_fraction(self, stage: PlannedStage) -> float:
        """Returns a stage's part of the run's FLOPs."""
        return stage.num_images * stage.forward_flops / self.forward_flops

    def stage_at(self, step: int) -> PlannedStage:
        """Returns the stage that holds a step, 0 <= step < num_steps."""
        firsts = [stage.first_step for stage in self.stages]
        return self.stages[bisect.bisect_right(firsts, step) - 1]

    def first_image(self, step: int) -> int:
        """Returns how many fresh images of the stream come before a step, 0 <= step <= num_steps."""
        stage = self.stage_at(step)
        return stage.first_image + stage.replay.fresh_before(step - stage.first_step) * self.world_size

    def stage_of_image(self, place: int) -> PlannedStage:
        """Returns the stage that reads a place of the stream of fresh images, 0 <= place < num_fresh_images."""
        firsts = [stage.first_image for stage in self.stages]
        return self.stages[bisect.bisect_right(firsts, place) - 1]

    def first_showing(self, step: int) -> int:
        """Returns how many images are shown before a step, repeats counted, 0 <= step <= num_steps."""
        stage = self.stage_at(step)
        before = sum(s.num_images for s in self.stages[: stage.index])
        return before + (step - stage.first_step) * stage.global_batch_size

    def loader_batches(self, step: int) -> list[int]:
        """Returns the sizes of the batches that the loader of one process prepares for a step, each at most a micro batch."""
        stage = self.stage_at(step)
        num_fresh = stage.replay.num_fresh(step - stage.first_step)
        parts = -(-num_fresh // stage.micro_batch_size)
        return [num_fresh // parts + (i < num_fresh % parts) for i in range(parts)]

    def compute_fraction(self, step: int) -> float:
        """Returns the part of the budget that is done before a step, by area."""
        stage = self.stage_at(step)
        before = sum(s.compute_fraction for s in self.stages[: stage.index])
        return min(1.0, before + stage.compute_fraction * (step - stage.first_step) / stage.num_steps)

    def equivalent_epochs_at(self, step: int) -> float:
        """Returns the equivalent epochs done before a step, by area."""
        return self.compute_fraction(step) * self.planned_equivalent_epochs

    def lr(self, step: int) -> float:
        """Returns the absolute learning rate of a step: linear warm-up, then one half cosine, over the compute done."""
        peak, fraction = self.stage_at(step).lr, self.compute_fraction(step)
        return self.min_lr + max(0.0, peak - self.min_lr) * schedule(fraction, self.warmup_fraction)

    def strength(self, step: int) -> float:
        """Returns the augmentation strength of a step, in [0, 1]."""
        fraction = self.compute_fraction(step)
        if not self.strengths:
            return fraction
        starts = [start for start, _ in self.strengths]
        return self.strengths[bisect.bisect_right(starts, fraction + 1e-9) - 1][1]

    def to_dict(self) -> dict[str, object]:
        """Returns the plan as plain values for JSON, properties included."""
        stages = [_with_properties(stage) | {"flops_fraction": self.flops_fraction(stage)} for stage in self.stages]
        return _with_properties(self) | {"stages": stages}


def _with_properties(decided: Plan | PlannedStage) -> dict[str, object]:
    names = [name for name, member in vars(type(decided)).items() if isinstance(member, property)]
    values = dataclasses.asdict(decided) | {name: getattr(decided, name) for name in names}
    return values | {name: plain_size(values[name]) for name in ("image_size", "input_size") if name in values}


def schedule(fraction: float, warmup_fraction: float) -> float:
    """Returns the learning rate over its peak at a compute fraction: warm-up from 0, then one half cosine to 0."""
    if fraction < warmup_fraction:
        return fraction / warmup_fraction
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup_fraction) / (1 - warmup_fraction)))


def make_plan(
    config: TrainConfig, cost: ModelCost, dataset_size: int, world_size: int = 1, local_world_size: int | None = None
) -> Plan:
    """Turns a config into integer steps, batches, learning rates and costs, stage by stage.

    Args:
        config: a checked config.
        cost: of the task's network, e.g. from `mae_cost`.
        dataset_size: images in the training set.
        world_size: training processes (GPUs).
        local_world_size: processes on one machine; None: all.
    Returns:
        The plan. Each stage's cost is its part of the budget to within one step; the total is the budget to within one
        step of the last stage.
    Raises:
        ConfigError: with all faults: the batch does not divide among the processes, a stage is too short for a single
            step or its images too small for the network, batch.micro_batch_sizes does not have one value for each stage,
            or the replay buffer does not fit the batch, the stages or its memory.
    """
    local_world_size = world_size if local_world_size is None else local_world_size
    _check_counts(dataset_size, world_size, local_world_size)
    curriculum = config.curriculum
    rows, notes = curriculum_rows(curriculum, config.data.image_size, cost.size_multiple)
    stages, faults, stage_notes = _plan_stages(config, cost, rows, dataset_size, world_size, local_world_size)
    faults += unused_rows(config.replay, [row.bandwidth for row in rows])
    if faults:
        raise ConfigError(faults, "plan")
    spent = sum(stage.full_size_images for stage in stages)
    plan = Plan(
        equivalent_epochs=curriculum.equivalent_epochs,
        baseline_equivalent_epochs=curriculum.baseline_equivalent_epochs,
        dataset_size=dataset_size,
        world_size=world_size,
        local_world_size=local_world_size,
        image_size=config.data.image_size,
        full_size_flops=cost.forward_flops(config.data.image_size),
        backward_factor=cost.backward_factor,
        warmup_fraction=curriculum.warmup_equivalent_epochs / curriculum.equivalent_epochs,
        min_lr=config.optimizer.min_lr,
        strengths=strength_starts(rows),
        notes=(*notes, *stage_notes, *cost.notes([stage.input_size for stage in stages])),
        stages=tuple(dataclasses.replace(stage, compute_fraction=stage.full_size_images / spent) for stage in stages),
    )
    return dataclasses.replace(plan, notes=plan.notes + _size_notes(plan))


def _plan_stages(
    config: TrainConfig,
    cost: ModelCost,
    rows: Sequence[StageConfig],
    dataset_size: int,
    world_size: int,
    local_world_size: int,
) -> tuple[list[PlannedStage], list[str], list[str]]:
    """Plans the stages one after the other. Neighbouring rows of one bandwidth and batch are one stage.

    Returns:
        The stages, their compute fractions still 0, with faults and notes.
    """
    image_size = config.data.image_size
    groups = [
        (bandwidth, own_batch, [row.compute_fraction for row in group])
        for (bandwidth, own_batch), group in groupby(rows, key=lambda row: (row.bandwidth, row.global_batch_size))
    ]
    sizes = [size_at(bandwidth, image_size, cost.size_multiple) for bandwidth, _, _ in groups]
    stages: list[PlannedStage] = []
    faults, notes = micro_batch_faults(config.batch, sizes), []
    asked = spent = 0.0  # images at full size
    limits = device_limits(config.batch, image_size, sizes)
    epochs = config.curriculum.equivalent_epochs
    for (bandwidth, own_batch, fractions), size, limit in zip(groups, sizes, limits, strict=True):
        batch, lr = stage_batch(config, size, own_batch)
        step_cost = batch * area_ratio(size, image_size)
        asked_at_rows = [asked + sum(fractions[: i + 1]) * epochs * dataset_size for i in range(len(fractions))]
        asked = asked_at_rows[-1]
        wanted_steps = (asked - spent) / step_cost  # corrects the rounding of the stage before
        num_visible, num_patches = (0, 0) if cost.num_tokens is None else cost.num_tokens(size)
        stage_faults = _stage_faults(config, size, batch, wanted_steps, world_size, num_visible, num_patches)
        if stage_faults:
            faults += stage_faults
            continue
        num_steps, local_batch = round(wanted_steps), batch // world_size
        replay, replay_faults = plan_replay(config, bandwidth, size, local_batch, num_steps, local_world_size)
        faults += replay_faults
        micro_batch_size, accum_steps = micro_batch(local_batch, limit)
        before = stages[-1] if stages else None
        first_step = before.first_step + before.num_steps if before else 0
        stage = PlannedStage(
            index=len(stages),
            bandwidth=bandwidth,
            input_size=size,
            image_size=image_size,
            dataset_size=dataset_size,
            num_steps=num_steps,
            first_step=first_step,
            first_image=before.first_image + before.num_fresh_images if before else 0,
            global_batch_size=batch,
            micro_batch_size=micro_batch_size,
            accum_steps=accum_steps,
            lr=lr,
            compute_fraction=0.0,  # known when the steps of all stages are
            replay=replay,
            num_patches=num_patches,
            num_visible=num_visible,
            forward_flops=cost.forward_flops(size),
            row_ends=tuple(first_step + round((at_row - spent) / step_cost) for at_row in asked_at_rows),
        )
        stages.append(stage)
        spent += stage.full_size_images
        notes += _micro_batch_notes(stage, limit)
    return stages, faults, notes


def _check_counts(dataset_size: int, world_size: int, local_world_size: int) -> None:
    if dataset_size < 1 or world_size < 1:
        raise ConfigError([f"dataset_size = {dataset_size} and world_size = {world_size} must be at least 1"], "plan")
    if not 1 <= local_world_size <= world_size:
        raise ConfigError(
            [f"local_world_size = {local_world_size} must be from 1 to world_size = {world_size}"], "plan"
        )


def _stage_faults(
    config: TrainConfig,
    size: Size,
    batch: int,
    wanted_steps: float,
    world_size: int,
    num_visible: int,
    num_patches: int,
) -> list[str]:
    faults = []
    if round(wanted_steps) < 1:
        faults.append(too_large_fault(config, size, batch, wanted_steps))
    if batch % world_size:
        faults.append(undivided_fault(config, size, batch, world_size))
    if num_patches and (num_visible < 1 or num_patches < 2):
        faults.append(
            f"the stage at bandwidth {size_text(size)} has {num_patches} patch{'' if num_patches == 1 else 'es'} per image, of "
            f"which {num_visible} {'is' if num_visible == 1 else 'are'} visible, too few to learn from: raise data.image_size, "
            "lower model.patch_size, or choose a curriculum without this bandwidth"
        )
    return faults


def _micro_batch_notes(stage: PlannedStage, limit: int | None) -> list[str]:
    local_batch = stage.micro_batch_size * stage.accum_steps
    if limit is None or stage.micro_batch_size >= min(limit, local_batch) / 2:
        return []
    return [
        f"stage at bandwidth {size_text(stage.input_size)}: the {local_batch} images of each process divide into micro batches "
        f"of {stage.micro_batch_size}, although the device holds {limit}; a global batch with more divisors would use it better"
    ]


def _size_notes(plan: Plan) -> tuple[str, ...]:
    """Returns notes on a batch or a budget that does not suit the size of the data set."""
    notes = []
    batch = max(stage.global_batch_size for stage in plan.stages)
    if batch > plan.dataset_size:
        notes.append(
            f"a step takes {batch:,} images, but the data set has {plan.dataset_size:,}, so each step shows images more than "
            "once: lower batch.global_batch_size"
        )
    if plan.num_steps < FEW_STEPS and plan.backward_factor > 1:  # a linear head alone needs fewer
        notes.append(
            f"the run makes only {plan.num_steps:,} optimizer steps; below about {FEW_STEPS:,} random weights may hardly "
            "move from their start, even over many epochs: lower batch.global_batch_size or raise "
            "curriculum.equivalent_epochs, and start from public weights if the data set is small"
        )
    return tuple(notes)
