"""The curriculum: config -> Plan, stage by stage. Pure, standard library only. The one home of "equivalent epochs".

Units. One *equivalent epoch* is the compute of one pass over the data at full image size. By area (the paper's count) an
image at bandwidth B costs (B / image_size)^2 of one at full size, so a share f of a budget of E equivalent epochs is
f * E * (image_size / B)^2 real passes over the data. The *compute fraction* is the part of the budget that is done;
learning rate and augmentation strength are functions of it, so they do not care where the stages lie.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType

from mae_et.config.schema import ClassifyConfig, PretrainConfig, StageConfig
from mae_et.curriculum.cost import backward_factor, forward_flops
from mae_et.curriculum.replay import StageReplay, plan_replay, unused_rows
from mae_et.errors import ConfigError
from mae_et.models.sizes import num_visible_patches

REFERENCE_SIZE = 224  # px; the presets are written for it


def _tenths(*bandwidths: int) -> tuple[StageConfig, ...]:
    """Ten equal tenths of the compute, RandAugment magnitude 0..9 (strength 0..1), one step a tenth."""
    return tuple(StageConfig(0.1, band, strength=i / 9) for i, band in enumerate(bandwidths))


# Sources: EfficientTrain++ (arXiv 2405.08768) and its authors' released code for etpp*; EfficientTrain (arXiv 2211.09703)
# for et, whose rows are equal parts of the EPOCHS, not of the compute (see `_rows`); "blog" is a summary's version that
# disagrees with the released code.
PRESETS: Mapping[str, tuple[StageConfig, ...]] = MappingProxyType(
    {
        "etpp": _tenths(96, 96, 160, 160, 160, 160, 224, 224, 224, 224),
        "etpp_deit": _tenths(96, 96, 160, 160, 160, 160, 192, 192, 224, 224),
        "etpp_convnext": _tenths(160, 160, 160, 160, 160, 160, 224, 224, 224, 224),
        "et": tuple(
            StageConfig(0.2, band, strength=m / 9)
            for band, m in ((160, 1), (160, 3), (160, 5), (192, 7), (224, 9))
        ),
        "blog": (StageConfig(0.4, 96), StageConfig(0.3, 128), StageConfig(0.3, 224)),
        "constant": (StageConfig(1.0, 224, strength=1.0),),
    }
)  # fmt: skip


@dataclass(frozen=True)
class PlannedStage:
    """One stage in integers. GFLOPs count multiplications and additions of the forward pass."""

    index: int
    bandwidth: int  # px
    compute_fraction: float  # of the budget by area, as planned
    num_steps: int
    first_step: int
    global_batch_size: int
    micro_batch_size: int
    accum_steps: int
    lr: float  # absolute, at the top of the schedule
    num_images: int  # shown in this stage, repeats counted
    num_fresh_images: int  # of them, prepared by the loader; the others come from the replay buffer
    first_image: int  # position in the stream of fresh images
    replay: StageReplay
    real_epochs: float  # images shown over those of the data set
    equivalent_epochs: float  # by area
    num_patches: int
    num_visible: int
    gflops_per_image: float
    flops_fraction: float  # of the run's FLOPs


@dataclass(frozen=True)
class Plan:
    """What a config means for a data set and a number of processes. See `make_plan`."""

    equivalent_epochs: float
    baseline_equivalent_epochs: float
    nominal_speedup: float  # baseline over budget, by area: the paper's count
    nominal_speedup_flops: float  # the same by counted FLOPs
    planned_equivalent_epochs: float  # what the integer steps add up to, by area
    equivalent_epochs_flops: float  # the same by counted FLOPs
    dataset_size: int
    world_size: int
    image_size: int
    patch_size: int
    num_steps: int
    num_images: int  # shown
    num_fresh_images: int  # of them, prepared by the loader
    real_epochs: float
    train_petaflops: float  # the whole run, with the backward passes
    backward_factor: int  # FLOPs of a training step over those of its forward pass
    warmup_fraction: float
    min_lr: float
    strengths: tuple[tuple[float, float], ...]  # (from this compute fraction on, strength); empty: strength = fraction
    replay_bytes: int  # of one process: the largest of the stages' buffers, which are not held at once
    local_world_size: int  # processes that share a machine and its memory
    notes: tuple[str, ...]
    stages: tuple[PlannedStage, ...]

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
        """Returns the sizes of the batches that the loader of one process prepares for a step, a micro batch at most."""
        stage = self.stage_at(step)
        num_fresh, most = stage.replay.num_fresh(step - stage.first_step), stage.micro_batch_size
        parts = -(-num_fresh // most)
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
        """Returns the plan as plain values for JSON."""
        return dataclasses.asdict(self)


def schedule(fraction: float, warmup_fraction: float) -> float:
    """Returns the learning rate over its peak at a compute fraction: warm-up from 0, then one half cosine to 0."""
    if fraction < warmup_fraction:
        return fraction / warmup_fraction
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup_fraction) / (1 - warmup_fraction)))


def make_plan(
    config: PretrainConfig | ClassifyConfig, dataset_size: int, world_size: int = 1, local_world_size: int | None = None
) -> Plan:
    """Turns a config into integer steps, batches, learning rates and costs, stage by stage.

    Args:
        config: a checked config.
        dataset_size: images in the training set.
        world_size: training processes (GPUs).
        local_world_size: of them, on one machine; None: all.
    Returns:
        The plan. Each stage's cost is its share of the budget to within one step; the total is the budget to within one
        step of the last stage.
    Raises:
        ConfigError: if the batch does not divide among the processes, a stage is too short for a single step,
            batch.micro_batch_sizes has not one value for each stage, or the replay buffer does not fit the batch, the
            stages or its memory.
    """
    if dataset_size < 1 or world_size < 1:
        raise ConfigError([f"dataset_size = {dataset_size} and world_size = {world_size} must be at least 1"], "plan")
    local_world_size = world_size if local_world_size is None else local_world_size
    if not 1 <= local_world_size <= world_size:
        raise ConfigError(
            [f"local_world_size = {local_world_size} must be from 1 to world_size = {world_size}"], "plan"
        )
    size, dims = config.data.image_size, config.model.dims
    rows, notes = _rows(config)
    strengths = _strengths(rows)
    budget = config.curriculum.equivalent_epochs * dataset_size  # in images at full size
    full_flops = forward_flops(config, size)

    faults: list[str] = []
    drafts: list[PlannedStage] = []
    replay_config = config.replay if isinstance(config, PretrainConfig) else None
    first_step = first_image = 0
    asked = spent = 0.0
    merged = [
        (band, batch, sum(row.compute_fraction for row in group))
        for (band, batch), group in groupby(rows, key=lambda row: (row.bandwidth, row.global_batch_size))
    ]
    rooms = _rooms(config, [band for band, _, _ in merged], faults)
    for (band, own_batch, fraction), room in zip(merged, rooms, strict=True):
        global_batch, lr = _batch_and_lr(config, band, own_batch)
        asked += fraction * budget
        step_cost = global_batch * (band / size) ** 2
        num_steps = round((asked - spent) / step_cost)  # the rounding of one stage is made good by the next
        if num_steps < 1:
            by_rule = config.batch.early_large_batch.rule == "area" and band < size
            faults.append(
                f"the stage at bandwidth {band} has room for {(asked - spent) / step_cost:.2f} steps of {global_batch} "
                "images"
                + (
                    " (batch.early_large_batch.rule = 'area'): lower batch.early_large_batch.max_global_batch_size"
                    if by_rule
                    else ": lower batch.global_batch_size"
                )
                + " or raise curriculum.equivalent_epochs"
            )
            continue
        spent += num_steps * step_cost
        if global_batch % world_size:
            faults.append(_undivided(config, global_batch, world_size, band))
            continue
        micro, accum = _micro_batch(global_batch // world_size, room)
        if room is not None and micro < min(room, global_batch // world_size) / 2:
            notes.append(
                f"stage at bandwidth {band}: {global_batch // world_size} images of each process divide into micro batches of "
                f"{micro} at most; a global batch with more divisors would use the device better"
            )
        replay, replay_faults, replay_notes = plan_replay(
            replay_config, band, size, config.model.in_chans, global_batch // world_size, num_steps, local_world_size
        )
        faults += replay_faults
        notes += replay_notes
        num_patches = (band // dims.patch_size) ** 2
        num_images, num_fresh_images = num_steps * global_batch, replay.fresh_before(num_steps) * world_size
        drafts.append(
            PlannedStage(
                index=len(drafts),
                bandwidth=band,
                compute_fraction=num_steps * step_cost,  # becomes a fraction below
                num_steps=num_steps,
                first_step=first_step,
                global_batch_size=global_batch,
                micro_batch_size=micro,
                accum_steps=accum,
                lr=lr,
                num_images=num_images,
                num_fresh_images=num_fresh_images,
                first_image=first_image,
                replay=replay,
                real_epochs=num_images / dataset_size,
                equivalent_epochs=num_steps * step_cost / dataset_size,
                num_patches=num_patches,
                num_visible=_num_visible(config, num_patches),
                gflops_per_image=forward_flops(config, band) / 1e9,
                flops_fraction=0.0,
            )
        )
        first_step += num_steps
        first_image += num_fresh_images
    faults += unused_rows(replay_config, [row.bandwidth for row in rows])
    if faults:
        raise ConfigError(faults, "plan")

    total_flops = sum(stage.num_images * stage.gflops_per_image for stage in drafts) * 1e9
    stages = tuple(
        dataclasses.replace(
            stage,
            compute_fraction=stage.compute_fraction / spent,
            flops_fraction=stage.num_images * stage.gflops_per_image * 1e9 / total_flops,
        )
        for stage in drafts
    )
    curriculum = config.curriculum
    return Plan(
        equivalent_epochs=curriculum.equivalent_epochs,
        baseline_equivalent_epochs=curriculum.baseline_equivalent_epochs,
        nominal_speedup=curriculum.baseline_equivalent_epochs / curriculum.equivalent_epochs,
        nominal_speedup_flops=curriculum.baseline_equivalent_epochs * dataset_size * full_flops / total_flops,
        planned_equivalent_epochs=spent / dataset_size,
        equivalent_epochs_flops=total_flops / (dataset_size * full_flops),
        dataset_size=dataset_size,
        world_size=world_size,
        image_size=size,
        patch_size=dims.patch_size,
        num_steps=first_step,
        num_images=sum(stage.num_images for stage in stages),
        num_fresh_images=first_image,
        real_epochs=sum(stage.num_images for stage in stages) / dataset_size,
        train_petaflops=backward_factor(config) * total_flops / 1e15,
        backward_factor=backward_factor(config),
        warmup_fraction=curriculum.warmup_equivalent_epochs / curriculum.equivalent_epochs,
        min_lr=config.optimizer.min_lr,
        strengths=strengths,
        replay_bytes=max(stage.replay.buffer_bytes for stage in stages),
        local_world_size=local_world_size,
        notes=tuple(notes),
        stages=stages,
    )


def _rows(config: PretrainConfig | ClassifyConfig) -> tuple[list[StageConfig], list[str]]:
    """Returns the curriculum's rows for the config's image size and patch, and notes on what was changed for them."""
    name, size, patch = config.curriculum.preset, config.data.image_size, config.model.dims.patch_size
    if name == "custom":
        return list(config.curriculum.stages), []
    rows, notes = [], []
    for row in PRESETS[name]:
        scaled = row.bandwidth * size / REFERENCE_SIZE
        if name == "blog" and size != REFERENCE_SIZE and size > 96:
            scaled = {96: 96, 128: (96 + size) / 2, REFERENCE_SIZE: size}[row.bandwidth]
        snapped = min(size, max(1, math.floor(scaled / patch + 0.5)) * patch)
        if snapped != row.bandwidth and (row.bandwidth, snapped) != (REFERENCE_SIZE, size):
            note = f"bandwidth {row.bandwidth} of preset {name!r} becomes {snapped}"
            if size != REFERENCE_SIZE:
                note += f" at image size {size}"
            if snapped != scaled:
                note += f" ({scaled:.4g} snapped to a multiple of the patch size {patch})"
            if note not in notes:
                notes.append(note)
        rows.append(dataclasses.replace(row, bandwidth=snapped))
    if name == "et":  # equal parts of the epochs: the compute of each goes with its area
        areas = [row.compute_fraction * row.bandwidth**2 for row in rows]
        rows = [
            dataclasses.replace(row, compute_fraction=area / sum(areas)) for row, area in zip(rows, areas, strict=True)
        ]
    return rows, notes


def _strengths(rows: list[StageConfig]) -> tuple[tuple[float, float], ...]:
    """Returns (compute fraction, strength from there on); empty where the rows leave it linear."""
    if any(row.strength is None for row in rows):
        return ()
    starts = [math.fsum(row.compute_fraction for row in rows[:i]) for i in range(len(rows))]
    return tuple((start, row.strength) for start, row in zip(starts, rows, strict=True) if row.strength is not None)


def area_batch(full_batch: int, image_size: int, bandwidth: int, most: int | None = None) -> int:
    """Returns the batch of a stage with smaller images: as many pixels a step as at full size.

    Rounded down to a multiple of an eighth of the full batch (of its largest divisor up to that). So what divides the full
    batch well divides this one, and it depends neither on the processes nor on the micro batch, which may change when a run
    is resumed.

    Args:
        full_batch: images a step at full size.
        image_size, bandwidth: px.
        most: a limit, at least full_batch; None: no limit.
    Source: our reading of EfficientTrain++ (arXiv 2405.08768), Early Large Batch, which gives no rule for the batch.
    """
    unit = next(n for n in range(max(1, full_batch // 8), 0, -1) if full_batch % n == 0)
    area = full_batch * image_size**2 // bandwidth**2
    return max(full_batch, (area if most is None else min(area, most)) // unit * unit)


def _batch_and_lr(config: PretrainConfig | ClassifyConfig, bandwidth: int, own_batch: int | None) -> tuple[int, float]:
    """Returns a stage's global batch and its absolute learning rate."""
    full, early, base_lr = config.batch.global_batch_size, config.batch.early_large_batch, config.optimizer.base_lr
    batch = own_batch or full
    if early.rule == "none":
        return batch, base_lr * batch / 256
    if early.rule == "area":
        batch = area_batch(full, config.data.image_size, bandwidth, early.max_global_batch_size)
    lr = base_lr * full / 256 * math.sqrt(batch / full)
    return batch, lr if early.max_lr is None else min(lr, early.max_lr)


def _undivided(config: PretrainConfig | ClassifyConfig, global_batch: int, world_size: int, bandwidth: int) -> str:
    """Says that a batch does not divide among the processes, and what would."""
    told = f"global_batch_size = {global_batch} does not divide among {world_size} processes; "
    if config.batch.early_large_batch.rule == "area" and bandwidth < config.data.image_size:
        return (
            f"{told}batch.early_large_batch.rule = 'area' chose it for bandwidth {bandwidth}: make "
            f"batch.global_batch_size a multiple of {8 * world_size}"
        )
    return f"{told}the nearest that does is {max(1, round(global_batch / world_size)) * world_size}"


def _rooms(config: PretrainConfig | ClassifyConfig, bandwidths: list[int], faults: list[str]) -> list[int] | list[None]:
    """Returns how many images one device holds in each stage; None: as many as it takes."""
    sizes, at_full_size, image_size = (
        config.batch.micro_batch_sizes,
        config.batch.micro_batch_size,
        config.data.image_size,
    )
    if sizes and len(sizes) == len(bandwidths):
        return list(sizes)
    if sizes:
        faults.append(
            f"batch.micro_batch_sizes has {len(sizes)} values, but the plan has {len(bandwidths)} stages, at bandwidths "
            f"{', '.join(map(str, bandwidths))}"
        )
    if at_full_size is None:
        return [None] * len(bandwidths)
    # As many images as keep the number of pixels. 5% over, so that 128 images at 224 may become 256, not 250, at 160.
    return [
        int(at_full_size * (image_size / band) ** 2 * 1.05) if band < image_size else at_full_size
        for band in bandwidths
    ]


def _micro_batch(local_batch: int, room: int | None) -> tuple[int, int]:
    """Returns (micro_batch_size, accum_steps): the largest equal parts of a process's batch that have room."""
    if room is None:
        return local_batch, 1
    accum = next(n for n in range(math.ceil(local_batch / room), local_batch + 1) if local_batch % n == 0)
    return local_batch // accum, accum


def _num_visible(config: PretrainConfig | ClassifyConfig, num_patches: int) -> int:
    if isinstance(config, PretrainConfig):
        return num_visible_patches(num_patches, config.model.mask_ratio)
    return num_patches
