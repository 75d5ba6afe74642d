"""The replay buffer as planned: fresh images per step, size and bytes of the buffer, stage by stage. Standard library only.

A *loader batch* is the fresh images that one process takes at a step that takes any. With factor R and n images per step:

- mix: every step takes n / R fresh images and draws the other n - n / R from the buffer.
- alternate: every R-th step of a stage takes n fresh images; the steps between draw all n from the buffer.

Fresh images enter the buffer before a step draws, in place of the oldest loader batch (first in, first out). Each stage
begins with an empty buffer. All of this follows from the step number, so a resumed run knows what the buffer held.
"""

from __future__ import annotations

from dataclasses import dataclass

from mae_et.config.training import ReplayConfig, ReplayStageConfig, TrainConfig
from mae_et.models.sizes import Size, size_text

# EfficientTrain++ (arXiv 2405.08768), its authors' released code for DeiT-S and ResNet-50, at image size 224.
PUBLISHED = (
    ReplayStageConfig(bandwidth=224, factor=1),
    ReplayStageConfig(bandwidth=160, factor=2, size=256),
    ReplayStageConfig(bandwidth=96, factor=4, size=1920),
)
PUBLISHED_SIZE = 224
CHUNKS_PER_LOADER_BATCH = 32  # images are drawn in runs of neighbours, as in the released code
GIB = 2**30


@dataclass(frozen=True)
class StageReplay:
    """How one process mixes fresh and replayed images in a stage. Steps are counted from the stage's first."""

    mode: str  # "off", "mix" or "alternate"
    factor: int  # R: images shown for each fresh one; 1: no buffer
    local_batch: int  # images shown at a step
    loader_batch: int  # fresh images of a step that takes any
    buffer_images: int  # capacity; a multiple of the loader batch
    buffer_bytes: int  # uint8 at the stage's size

    @property
    def is_on(self) -> bool:
        return self.factor > 1

    @property
    def chunk_size(self) -> int:
        """Neighbours drawn together: 1/32 of a loader batch, or the next smaller divisor of it."""
        limit = max(1, self.loader_batch // CHUNKS_PER_LOADER_BATCH)
        return next(size for size in range(limit, 0, -1) if self.loader_batch % size == 0)

    def num_fresh(self, step: int) -> int:
        """Returns the fresh images of a step."""
        return 0 if self.mode == "alternate" and step % self.factor else self.loader_batch

    def fresh_before(self, step: int) -> int:
        """Returns the fresh images of all steps before one."""
        return self.loader_batch * (-(-step // self.factor) if self.mode == "alternate" else step)

    def first_held(self, step: int) -> int:
        """Returns the earliest step whose fresh images the buffer still holds before `step`; `step` if it holds none."""
        if not self.is_on or step == 0:
            return step
        oldest = max(0, self.fresh_before(step) - self.buffer_images) // self.loader_batch
        return oldest * self.factor if self.mode == "alternate" else oldest


def plan_replay(
    config: TrainConfig, bandwidth: int, size: Size, local_batch: int, num_steps: int, local_world_size: int
) -> tuple[StageReplay, list[str]]:
    """Plans the buffer of one stage.

    Args:
        config: of the run.
        bandwidth: of the stage, px.
        size: of the stage's images, px.
        local_batch: images that one process shows at a step.
        num_steps: of the stage.
        local_world_size: processes that share a machine's memory.
    Returns:
        The plan and its faults.
    """
    options, no_buffer = config.replay, StageReplay("off", 1, local_batch, local_batch, 0, 0)
    row = _row(options, bandwidth, min(config.data.image_size))
    if row is None or row.factor == 1:
        return no_buffer, []
    factor, mode = row.factor, options.mode
    if mode == "mix" and local_batch % factor:
        return no_buffer, [_does_not_divide(row, local_batch)]
    loader_batch = local_batch // factor if mode == "mix" else local_batch
    # `size` counts loader batches of n / R in both modes, so that the same number takes the same memory.
    num_batches = row.size if mode == "mix" else max(1, row.size // factor)
    num_batches = min(num_batches, num_steps if mode == "mix" else -(-num_steps // factor))  # what the stage can fill
    batch_bytes = loader_batch * len(config.data.mean) * size[0] * size[1]
    num_images, num_bytes = num_batches * loader_batch, num_batches * batch_bytes
    replay = StageReplay(mode, factor, local_batch, loader_batch, num_images, num_bytes)
    limit = None if options.max_memory_gib is None else options.max_memory_gib * GIB / local_world_size
    if limit is None or num_bytes <= limit:
        return replay, []
    fitting = int(limit // batch_bytes) * (1 if mode == "mix" else factor)
    fix = (
        f"lower its size in replay.stages to {fitting}, or raise the limit"
        if fitting
        else "not even one loader batch fits: raise the limit or lower batch.global_batch_size"
    )
    return replay, [
        f"the replay buffer at bandwidth {size_text(size)} takes {num_bytes * local_world_size / GIB:.4g} GiB of a machine "
        f"({local_world_size} processes, {num_images} images each), more than "
        f"replay.max_memory_gib = {options.max_memory_gib:g}: {fix}"
    ]


def unused_rows(config: ReplayConfig, bandwidths: list[int]) -> list[str]:
    """Returns a fault for each row of the config whose bandwidth no stage has."""
    return [
        f"replay.stages[{i}].bandwidth = {row.bandwidth}: no stage has it; the stages' bandwidths are "
        f"{', '.join(map(str, dict.fromkeys(bandwidths)))}"
        for i, row in enumerate(config.stages)
        if row.bandwidth not in bandwidths
    ]


def _row(config: ReplayConfig, bandwidth: int, image_size: int) -> ReplayStageConfig | None:
    """Returns the config's row for a bandwidth, else the published one of the nearest relative bandwidth; None: no replay."""
    if config.mode == "off":
        return None
    if config.stages:
        return next((row for row in config.stages if row.bandwidth == bandwidth), None)
    scaled = bandwidth * PUBLISHED_SIZE / image_size
    nearest = min(PUBLISHED, key=lambda row: abs(row.bandwidth - scaled))  # half way: the larger, which replays less
    return nearest.model_copy(update={"bandwidth": bandwidth})


def _does_not_divide(row: ReplayStageConfig, local_batch: int) -> str:
    below = next(n for n in range(row.factor, 0, -1) if local_batch % n == 0)
    above = (
        next(n for n in range(row.factor, local_batch + 1) if local_batch % n == 0) if row.factor <= local_batch else 0
    )
    near = f"{below} and {above}" if above else str(below)
    batch = max(1, round(local_batch / row.factor)) * row.factor
    return (
        f"replay factor {row.factor} at bandwidth {row.bandwidth} does not divide the {local_batch} images that each process "
        f"shows at a step; the nearest factors that do are {near}, the nearest such batch is {batch} images a process; or "
        'set replay.mode = "alternate", which takes whole batches'
    )
