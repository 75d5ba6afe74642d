"""The batch of a stage: Early Large Batch, its learning rate, and the micro batch that a device holds. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mae_et.config.training import BatchConfig, TrainConfig
from mae_et.models.sizes import Size, area_ratio, as_size, size_text


def area_batch(full_batch: int, image_size: int | Size, size: int | Size, limit: int | None = None) -> int:
    """Returns the batch of a stage with smaller images: as many pixels per step as at full size.

    Rounded down to a multiple of an eighth of the full batch (of its largest divisor up to that). So what divides the full
    batch well divides this one. It depends neither on the processes nor on the micro batch, which may change when a run is
    resumed.

    Args:
        full_batch: images per step at full size.
        image_size: px, side or (H, W), at full size.
        size: px, of the stage.
        limit: at least full_batch; None: no limit.
    Source: our reading of EfficientTrain++ (arXiv 2405.08768), Early Large Batch, which gives no rule for the batch.
    """
    unit = next(n for n in range(max(1, full_batch // 8), 0, -1) if full_batch % n == 0)
    area = full_batch * math.prod(as_size(image_size)) // math.prod(as_size(size))
    return max(full_batch, (area if limit is None else min(area, limit)) // unit * unit)


def stage_batch(config: TrainConfig, size: Size, own_batch: int | None) -> tuple[int, float]:
    """Returns a stage's global batch and its absolute learning rate at the top of the schedule.

    Args:
        config: of the run.
        size: of the stage's images, px.
        own_batch: the stage's own global_batch_size, if it has one.
    """
    full, early, base_lr = config.batch.global_batch_size, config.batch.early_large_batch, config.optimizer.base_lr
    batch = own_batch or full
    if early.rule == "none":
        return batch, base_lr * batch / 256
    if early.rule == "area":
        batch = area_batch(full, config.data.image_size, size, early.max_global_batch_size)
    lr = base_lr * full / 256 * math.sqrt(batch / full)
    return batch, lr if early.max_lr is None else min(lr, early.max_lr)


def too_large_fault(config: TrainConfig, size: Size, batch: int, num_steps: float) -> str:
    """Returns a message for a stage whose share of the budget is not enough for one step."""
    rule, key = "", "batch.global_batch_size"
    if config.batch.early_large_batch.rule == "area" and size != config.data.image_size:
        rule, key = " (batch.early_large_batch.rule = 'area')", "batch.early_large_batch.max_global_batch_size"
    return (
        f"the stage at bandwidth {size_text(size)} has room for {num_steps:.2f} steps of {batch} images{rule}: lower {key} or "
        "raise curriculum.equivalent_epochs"
    )


def undivided_fault(config: TrainConfig, size: Size, batch: int, world_size: int) -> str:
    """Returns a message for a batch that does not divide among the processes, with the nearest that does."""
    fault = f"global_batch_size = {batch} does not divide among {world_size} processes; "
    if config.batch.early_large_batch.rule == "area" and size != config.data.image_size:
        return (
            f"{fault}batch.early_large_batch.rule = 'area' chose it for bandwidth {size_text(size)}: make "
            f"batch.global_batch_size a multiple of {8 * world_size}"
        )
    return f"{fault}the nearest that does is {max(1, round(batch / world_size)) * world_size}"


def device_limits(config: BatchConfig, image_size: Size, sizes: Sequence[Size]) -> list[int | None]:
    """Returns how many images one device holds in each stage; None: no limit.

    The images of `micro_batch_size` are those at full size; smaller ones may be as many as have the same number of pixels.
    `micro_batch_sizes` that do not match the stages are ignored here: `micro_batch_faults` reports them.
    """
    if len(config.micro_batch_sizes) == len(sizes):
        return list(config.micro_batch_sizes)
    at_full_size = config.micro_batch_size
    if at_full_size is None:
        return [None] * len(sizes)
    # 5% over, so that 128 images at 224 may become 256, not 250, at 160.
    return [
        at_full_size if size == image_size else int(at_full_size * area_ratio(image_size, size) * 1.05)
        for size in sizes
    ]


def micro_batch_faults(config: BatchConfig, stage_sizes: Sequence[Size]) -> list[str]:
    """Returns a fault if `micro_batch_sizes` does not have one value for each stage."""
    sizes = config.micro_batch_sizes
    if not sizes or len(sizes) == len(stage_sizes):
        return []
    return [
        f"batch.micro_batch_sizes has {len(sizes)} values, but the plan has {len(stage_sizes)} stages, at bandwidths "
        f"{', '.join(map(size_text, stage_sizes))}"
    ]


def micro_batch(local_batch: int, limit: int | None) -> tuple[int, int]:
    """Returns (micro_batch_size, accum_steps): the largest equal parts of a process's batch within the limit."""
    if limit is None:
        return local_batch, 1
    accum = next(n for n in range(math.ceil(local_batch / limit), local_batch + 1) if local_batch % n == 0)
    return local_batch // accum, accum
