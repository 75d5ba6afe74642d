"""The replay buffer: prepared images of a stage, shown again where the loader is the limit.

Each process has its own, in the memory of the training process: one uint8 tensor, viewed with another shape at each stage,
that holds the newest fresh images after augmentation and low-frequency crop. A step's images are gathered from it in one
call. What it holds before a step and what the step draws follow from (seed, step, process), so a resumed run can read the
same fresh images again and continue with the same losses. See mae_et/curriculum/replay.py for the counts.

Shapes: n images of a micro batch, C channels, h x w px of the stage's images, N capacity of the buffer in images.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from mae_et.config.training import TrainConfig
from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.curriculum.replay import GIB
from mae_et.data.buffers import BadImage, Batch, check_shared_memory
from mae_et.data.need import MeasuredBatches
from mae_et.data.sources.source import ImageSource, as_regions
from mae_et.data.stream import (
    ImageStream,
    Stream,
    choose_num_workers,
    make_loader,
    reading,
)
from mae_et.data.transforms import TrainTransform
from mae_et.errors import UserError
from mae_et.lowfreq import crop_to_bytes
from mae_et.models.sizes import Size

log = logging.getLogger(__name__)

_DRAWS = 0x5EED  # keeps the draws apart from other uses of (seed, step)
MEMORY_SHARE = 0.9  # of the free memory that buffers may be planned to fill: loader and model need some too
SECONDS_BETWEEN_LINES = 5.0


class ReplayBuffer:
    """A ring of the newest images. Images are counted from the first of the stage: image i lies in slot i % N.

    Args:
        num_bytes: of the largest stage's buffer.
    """

    def __init__(self, num_bytes: int) -> None:
        self.storage = torch.empty(num_bytes, dtype=torch.uint8)  # pages are taken as they are written
        self.first = self.end = 0

    def reset(self, room: int, channels: int, size: Size, first: int = 0) -> None:
        """Empties the buffer for another stage.

        Args:
            room: N.
            channels: C.
            size: (h, w) in px.
            first: number of the next image to come.
        """
        shape = (room, channels, *size)
        self.pixels = self.storage[: math.prod(shape)].view(shape)
        self.labels, self.places = torch.empty(2, room, dtype=torch.int64)
        self.first = self.end = first

    @property
    def oldest(self) -> int:
        """Number of the oldest image held; `end` if there is none."""
        return max(self.first, self.end - len(self.pixels))

    def insert(self, images: Tensor, labels: Tensor, places: Tensor) -> None:
        """Adds images in place of the oldest.

        Args:
            images: [n, C, h, w] uint8; n such that they do not straddle the ring's end.
            labels, places: [n] int64.
        """
        assert images.shape[1:] == self.pixels.shape[1:], "an image of another stage"
        start = self.end % len(self.pixels)
        slots = slice(start, start + len(images))
        assert slots.stop <= len(self.pixels), "the room is a multiple of the loader batch"
        self.pixels[slots], self.labels[slots], self.places[slots] = images, labels, places
        self.end += len(images)

    def draw(self, num_images: int, chunk_size: int, rng: np.random.Generator) -> np.ndarray:
        """Draws numbers of held images uniformly with replacement, in runs of `chunk_size`. Returns [num_images] int64."""
        num_chunks = (self.end - self.oldest) // chunk_size
        firsts = self.oldest + chunk_size * rng.integers(num_chunks, size=num_images // chunk_size)
        return (firsts[:, None] + np.arange(chunk_size)).reshape(-1)

    def gather(self, numbers: np.ndarray, pin_memory: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the images [n, C, h, w] uint8, labels and places [n] int64 of some numbers; pinned for a GPU."""
        slots = torch.from_numpy(numbers % len(self.pixels))
        # Pinned memory comes from torch's cache, which hands a block out again only when its transfer is over.
        images = torch.empty(len(slots), *self.pixels.shape[1:], dtype=torch.uint8, pin_memory=pin_memory)
        torch.index_select(self.pixels, 0, slots, out=images)
        return images, self.labels[slots], self.places[slots]


class StoredCrop:
    """Crops the fresh images of stages with replay to what the buffer holds, in the loader's processes.

    Args:
        plan: says which stages have replay, and the sizes of their images.
        centered: phase of the crop.
    """

    def __init__(self, plan: Plan, centered: bool) -> None:
        self.plan, self.centered = plan, centered

    def __call__(self, batch: Batch) -> Batch:
        """Changes the images to [n, C, h, w] uint8 where they are not yet."""
        stage = self.plan.stage_of_image(batch.first_place)
        if stage.replay.is_on and batch.images.numel() and batch.images.shape[-2:] != stage.input_size:
            batch.images = crop_to_bytes(batch.images, stage.input_size, self.centered)
        return batch


class ReplayBatches:
    """Mixes the micro batches of one process from the loader's fresh images and the buffer, as the plan says.

    In stages without replay the loader's batches pass through. All batches have `showings`, so that each showing of an
    image has a mask of its own. At a step, images are drawn for all its micro batches at once: accumulation changes
    nothing. The number of processes does: each has its own buffer.

    Args:
        fresh: the loader's batches from the step `entry_step(plan, first_step)` on; in stages with replay at the
            stage's size, see `StoredCrop`.
        plan: says what each step takes.
        seed: of the draws.
        first_step: the first step whose batches are returned.
        rank: of this process.
        pin_memory: for transfers to a GPU.
    """

    def __init__(
        self,
        fresh: Iterable[Batch],
        plan: Plan,
        seed: int,
        first_step: int = 0,
        rank: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.fresh, self.plan, self.seed, self.first_step, self.rank = fresh, plan, seed, first_step, rank
        self.pin_memory = pin_memory
        self.buffer = ReplayBuffer(plan.replay_bytes)

    def __iter__(self) -> Iterator[Batch]:
        self.batches = iter(self.fresh)
        self.step, self.micro = entry_step(self.plan, self.first_step), 0
        self.stage: PlannedStage | None = None  # that the buffer is set up for
        self.numbers: np.ndarray = np.empty(0, dtype=np.int64)  # of the step's images in the buffer
        self.bad_images: list[BadImage] = []
        self.unusable: Batch | None = None  # a batch whose images were all unreadable: the loop stops at it
        return self

    def refill(self, stop_asked: Callable[[], bool] = lambda: False) -> int:
        """Reads again what the buffer held before the first step, if that step lies inside a stage with replay.

        Args:
            stop_asked: ends the refill early once it returns true.
        Returns:
            The number of images read.
        """
        steps = range(self.step, self.first_step)
        if not steps:
            return 0
        stage, num_read, last_line = self.plan.stage_at(self.step), 0, time.monotonic()
        total = sum(stage.replay.num_fresh(step - stage.first_step) for step in steps)
        log.info("replay buffer: refilling after resume; %d images of each process are prepared again", total)
        for step in steps:
            if stop_asked() or self.unusable is not None:
                break
            self._take_fresh(stage, step)
            self.step += 1
            num_read = self.buffer.end - self.buffer.first
            if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                log.info("replay buffer: %d of %d images refilled", num_read, total)
        return num_read

    def __next__(self) -> Batch:
        self.refill()
        if self.step >= self.plan.num_steps:
            raise StopIteration
        stage = self.plan.stage_at(self.step)
        batch = self._mixed(stage) if stage.replay.is_on else next(self.batches)
        size = stage.micro_batch_size
        first = self.plan.first_showing(self.step) + (self.rank * stage.accum_steps + self.micro) * size
        batch.showings = torch.arange(first, first + len(batch.images))
        self.micro += 1
        if self.micro == stage.accum_steps:
            self.step, self.micro = self.step + 1, 0
        return batch

    def _mixed(self, stage: PlannedStage) -> Batch:
        """The next micro batch of a stage with replay."""
        if self.micro == 0 and self.unusable is None:
            self._take_fresh(stage, self.step)
        if self.unusable is not None:
            return self.unusable
        if self.micro == 0:
            num_fresh = stage.replay.num_fresh(self.step - stage.first_step)
            rng = np.random.default_rng((_DRAWS, self.seed, self.step, self.rank))
            drawn = self.buffer.draw(stage.replay.local_batch - num_fresh, stage.replay.chunk_size, rng)
            self.numbers = np.concatenate([np.arange(self.buffer.end - num_fresh, self.buffer.end), drawn])
        numbers = self.numbers[self.micro * stage.micro_batch_size :][: stage.micro_batch_size]
        images, labels, places = self.buffer.gather(numbers, self.pin_memory)
        bad_images, self.bad_images = self.bad_images, []
        return Batch(images, labels, places, bad_images, int(places[0]))

    def _take_fresh(self, stage: PlannedStage, step: int) -> None:
        """Moves a step's fresh images into the buffer, which is emptied first where another stage begins."""
        replay = stage.replay
        for size in self.plan.loader_batches(step):
            batch = next(self.batches)
            self.bad_images += batch.bad_images
            if len(batch.images) < size:
                self.unusable = batch
                return
            if self.stage is not stage:
                num_before = replay.fresh_before(step - stage.first_step)
                self.buffer.reset(replay.buffer_images, batch.images.shape[1], stage.input_size, num_before)
                self.stage = stage
            self.buffer.insert(batch.images, batch.labels, batch.places)

    def _shutdown_workers(self) -> None:
        """Ends the loader's processes, as a DataLoader's iterator does; see `loader.reading`."""
        if hasattr(self.batches, "_shutdown_workers"):
            self.batches._shutdown_workers()


def entry_step(plan: Plan, first_step: int) -> int:
    """Returns the earliest step whose fresh images the buffer still held when a run continues at `first_step`.

    Args:
        plan: of the run.
        first_step: the next step, 0 <= first_step <= plan.num_steps.
    """
    if first_step >= plan.num_steps:
        return first_step
    stage = plan.stage_at(first_step)
    return stage.first_step + stage.replay.first_held(first_step - stage.first_step)


def check_memory(plan: Plan, available: int | None) -> None:
    """Refuses buffers that do not fit into the machine's memory together.

    Args:
        plan: of the run.
        available: bytes free on the machine, as from `mae_et.engine.hardware.available_memory`; None: unknown, which is logged.
    Raises:
        UserError: naming the sizes and how to reduce them.
    """
    if not plan.replay_bytes:
        return
    needed = plan.replay_bytes * plan.local_world_size
    needs = (
        f"the replay buffers take {needed / GIB:.3g} GiB of this machine ({plan.local_world_size} processes, "
        f"{plan.replay_bytes / GIB:.3g} GiB each)"
    )
    if available is None:
        log.warning("%s; the free memory of this system is unknown: set replay.max_memory_gib to limit them", needs)
        return
    limit = MEMORY_SHARE * available
    if needed > limit:
        raise UserError(
            f"{needs}, but {available / GIB:.3g} GiB are free, of which {MEMORY_SHARE:.0%} may be planned: lower the size in "
            "replay.stages"
        )
    log.info("%s; %.3g GiB are free", needs, available / GIB)


class ReplayStream:
    """A stream with a replay buffer, which it restores when it is opened inside a stage.

    Args:
        make_loader: first step -> fresh micro batches from that step on, cropped by `StoredCrop`.
        plan: of the run.
        seed: of the draws.
        rank: of this process.
        pin_memory: for transfers to a GPU.
    """

    def __init__(
        self, make_loader: Callable[[int], Iterable[Batch]], plan: Plan, seed: int, rank: int, pin_memory: bool
    ) -> None:
        self.make_loader, self.plan, self.seed = make_loader, plan, seed
        self.rank, self.pin_memory = rank, pin_memory
        self.refilled_images, self.refill_seconds = 0, 0.0

    @contextlib.contextmanager
    def open(self, step: int, stop_requested: Callable[[], bool]) -> Iterator[Iterator[Batch]]:
        fresh = self.make_loader(entry_step(self.plan, step))
        replay = ReplayBatches(fresh, self.plan, self.seed, step, self.rank, pin_memory=self.pin_memory)
        with reading(replay) as batches:
            start = time.perf_counter()
            self.refilled_images = replay.refill(stop_requested)
            if self.refilled_images:
                self.refill_seconds = time.perf_counter() - start
                log.info("replay buffer: refilled in %.1f s", self.refill_seconds)
            yield batches


def make_stream(
    source: ImageSource,
    transform: TrainTransform,
    plan: Plan,
    config: TrainConfig,
    rank: int = 0,
    on_gpu: bool = False,
) -> Stream:
    """Returns the training images of one process as the plan mixes them.

    Args:
        source: the images.
        transform: their augmentation.
        plan: of the run.
        config: its data, curriculum.centered and run.seed.
        rank: of this process.
        on_gpu: pins the memory of the batches for transfers to a GPU.
    Raises:
        UserError: if the images have a type that the augmentation or the replay buffer cannot hold.
    """
    _check_type(source, transform, plan)
    num_workers = choose_num_workers(config.data.num_workers, plan.local_world_size, on_gpu)
    is_direct = config.data.loading == "direct"
    check_shared_memory(plan, is_direct, num_workers, source.decoding.pixel_bytes)
    if (regions := as_regions(source)) is not None:
        regions.check_sizes(stage.input_size if is_direct else plan.image_size for stage in plan.stages)
    crop = StoredCrop(plan, config.curriculum.centered) if plan.replay_bytes else None
    seed, data = config.run.seed, config.data

    def loader(step: int) -> Iterable[Batch]:
        fresh = make_loader(
            source, transform, plan, seed, step, rank, num_workers, on_gpu, crop, data.loading, data.num_repeats,
            data.shuffle_block, data.train_weights,
        )  # fmt: skip
        return MeasuredBatches(fresh, num_workers, plan.local_world_size) if num_workers else fresh

    if not plan.replay_bytes:
        return ImageStream(loader)
    return ReplayStream(loader, plan, seed, rank, on_gpu)


def _check_type(source: ImageSource, transform: TrainTransform, plan: Plan) -> None:
    """Checks what the config could not: raw shards say themselves how many bits they have."""
    if source.decoding.dtype == "uint8":
        return
    if transform.ramp == "randaugment":
        raise UserError(
            'data.augmentation.ramp = "randaugment" changes 8-bit pictures, and the images of data.train have more bits: '
            'use "none" or "crop_scale"'
        )
    if plan.replay_bytes:
        raise UserError(
            "the replay buffer keeps 8-bit images, and those of data.train have more bits: set replay.mode='off'"
        )
