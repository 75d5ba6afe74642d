"""The stream of training images: which image at which place with which augmentation, read by worker processes.

The stream is defined by (seed, place) alone. Place i belongs to pass i // N over the data, each pass has its own
permutation, and an image's augmentation is seeded by its place. So the stream does not depend on the number of workers or
processes, and a run can enter it at any image.

Shapes: n images of a micro batch, C channels.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mae_et.curriculum.plan import Plan
from mae_et.data.buffers import BadImage, Batch, BatchBuffers, SlotBatch, buffer_sizes
from mae_et.data.decoding import BadImageError
from mae_et.data.jpeg import check_available
from mae_et.data.order import ImageOrder, WeightedOrder
from mae_et.data.sources.source import ImageSource, as_regions, parts_of, read_ahead
from mae_et.data.transforms import Box, TrainTransform, sample_rng, seed_torch
from mae_et.errors import DataError
from mae_et.models.sizes import Size
from mae_et.process import available_cores

log = logging.getLogger(__name__)

Loading = Literal["exact", "fast", "direct"]
MAX_REPLACEMENTS = 20  # unreadable images in a row before the loader gives up


@dataclass(frozen=True)
class Draw:
    """One image of the stream."""

    index: int  # into the data set
    place: int  # in the stream
    strength: float  # of the augmentation
    size: Size  # of the stage's images, px


class _Task(NamedTuple):
    """A micro batch to prepare, and the slot for its images."""

    draws: list[Draw]
    slot: int | None


class _StreamDataset(Dataset):
    """Prepares whole micro batches."""

    def __init__(
        self,
        source: ImageSource,
        transform: TrainTransform,
        seed: int,
        loading: Loading,
        buffers: BatchBuffers,
        finish: Callable[[Batch], Batch] | None = None,
        in_blocks: bool = False,
    ) -> None:
        self.source, self.transform, self.seed, self.loading = source, transform, seed, loading
        self.buffers, self.finish, self.in_blocks = buffers, finish, in_blocks
        self.regions = as_regions(source) if loading != "exact" and transform.resizes_tensors else None
        # jpeg.py decodes to 8-bit RGB.
        self.reads_jpeg = loading != "exact" and source.decoding.is_picture and source.decoding.num_channels == 3

    def __getitems__(self, tasks: list[_Task]) -> list[Batch]:
        return [self.prepare(task) for task in tasks]

    def prepare(self, task: _Task) -> Batch:
        """Returns a micro batch; images that cannot be replaced are missing from it."""
        start = time.perf_counter()
        draws, slot = task
        read_ahead(self.source, [draw.index for draw in draws], only_always=not self.in_blocks)
        size = draws[0].size if self.loading == "direct" else self.transform.image_size
        shape = (len(draws), self.source.decoding.num_channels, *size)
        dtype: torch.dtype = getattr(torch, self.source.decoding.dtype)
        images = self.buffers.view(slot, shape, dtype)
        if images is None:
            images, slot = torch.empty(shape, dtype=dtype), None
        labels: list[int] = []
        places: list[int] = []
        bad_images: list[BadImage] = []
        for draw, crop in zip(draws, self._draw_crops(draws), strict=True):
            index = self._fill(images[len(places)], draw, crop, bad_images)
            if index is not None:  # otherwise the training process stops the run
                labels.append(-1 if self.source.labels is None else int(self.source.labels[index]))
                places.append(draw.place)
        filled = images[: len(places)]
        batch = Batch(filled, torch.tensor(labels), torch.tensor(places), bad_images, draws[0].place)
        if self.finish is not None:
            batch = self.finish(batch)
        if slot is not None:
            batch = self._in_slot(batch, slot, filled)
        batch.seconds = time.perf_counter() - start
        return batch

    def _in_slot(self, batch: Batch, slot: int, filled: Tensor) -> Batch:
        if batch.images is not filled:  # the crop of the replay buffer, which is smaller
            view = self.buffers.view(slot, tuple(batch.images.shape), batch.images.dtype)
            assert view is not None
            batch.images = view.copy_(batch.images)
        placed = SlotBatch(batch.images, batch.labels, batch.places, batch.bad_images, batch.first_place)
        placed.buffers, placed.slot = self.buffers, slot
        return placed

    def _draw_crops(self, draws: list[Draw]) -> list[tuple[Box, bool] | None]:
        """Draws the crops of a batch of stored pixels, in half of the time that drawing between the images takes."""
        if self.regions is None or not self.transform.draws_from_torch_alone:
            return [None] * len(draws)
        crops: list[tuple[Box, bool] | None] = []
        with self._rng(draws[0]):  # saves and restores the generator's state, once
            for draw in draws:
                seed_torch(self._seed(draw))
                crops.append(self.transform.draw_crop(*self.regions.shape(draw.index), draw.strength))
        return crops

    def _fill(self, out: Tensor, draw: Draw, crop: tuple[Box, bool] | None, bad_images: list[BadImage]) -> int | None:
        """Writes the image of a draw, or another in place of an unreadable one; returns its index, or None."""
        index = draw.index
        for attempt in range(MAX_REPLACEMENTS + 1):
            try:
                out.copy_(self._prepare(index, draw, crop))
                return index
            except BadImageError as error:
                crop = None  # another image has another shape
                bad_images.append(BadImage(index, str(error)))
                index = int(np.random.default_rng((self.seed, draw.place, attempt)).integers(len(self.source)))
        return None

    def _prepare(self, index: int, draw: Draw, crop: tuple[Box, bool] | None) -> Tensor:
        size = draw.size if self.loading == "direct" else None
        if self.regions is not None:
            read = partial(self.regions.read_region, index)
            if crop is not None:
                return self.transform.from_region(read, crop, draw.strength, size)
            with self._rng(draw):
                crop = self.transform.draw_crop(*self.regions.shape(index), draw.strength)
                return self.transform.from_region(read, crop, draw.strength, size)
        content = self.source.read(index) if self.reads_jpeg else None
        if content is not None:
            with self._rng(draw):
                pixels = self.transform.from_jpeg(content, draw.strength, size, self.source.decoding.max_pixels)
            if pixels is not None:
                return pixels
        image = self.source.load(index)
        with self._rng(draw):
            return self.transform(image, draw.strength, size)

    def _rng(self, draw: Draw) -> contextlib.AbstractContextManager[None]:
        return sample_rng(self._seed(draw), self.transform.draws_from_torch_alone)

    def _seed(self, draw: Draw) -> int:
        return self.seed * 0x9E3779B1 + draw.place


class _MicroBatches(Sampler[list[Draw]]):
    """The new images of one process, from a step to the end of the plan, in micro batches.

    With `num_repeats` R, the places R i to R i + R - 1 show the same image (repeated augmentation).
    """

    def __init__(self, plan: Plan, order: ImageOrder, first_step: int, rank: int, num_repeats: int = 1) -> None:
        self.plan, self.order, self.first_step, self.rank = plan, order, first_step, rank
        self.num_repeats = num_repeats

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.first_step, self.plan.num_steps):
            strength, sizes = self.plan.strength(step), self.plan.loader_batches(step)
            input_size = self.plan.stage_at(step).input_size
            place = self.plan.first_image(step) + self.rank * sum(sizes)
            for size in sizes:
                drawn = np.arange(place, place + size) // self.num_repeats
                images = self.order.images(int(drawn[0]), int(drawn[-1] - drawn[0]) + 1)[drawn - drawn[0]]
                yield [Draw(index, place + i, strength, input_size) for i, index in enumerate(images.tolist())]
                place += size


class _WithSlots(Sampler[list[_Task]]):
    """Adds a free slot to each micro batch, when the task is given to a loader process."""

    def __init__(self, batches: _MicroBatches, buffers: BatchBuffers) -> None:
        self.batches, self.buffers = batches, buffers

    def __iter__(self) -> Iterator[list[_Task]]:
        for draws in self.batches:
            yield [_Task(draws, self.buffers.take())]


def make_loader(
    source: ImageSource,
    transform: TrainTransform,
    plan: Plan,
    seed: int,
    first_step: int = 0,
    rank: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    finish: Callable[[Batch], Batch] | None = None,
    loading: Loading = "exact",
    num_repeats: int = 1,
    shuffle_block: int = 1,
    weights: Sequence[float] = (),
) -> DataLoader:
    """Returns the new micro batches of one process, stage by stage, from a step to the end of the plan.

    Args:
        source: the images.
        transform: the augmentation.
        plan: number of images and strength of the augmentation at each step.
        seed: of the order and the augmentation.
        first_step: where to enter the stream.
        rank: this process, 0 <= rank < plan.world_size.
        num_workers: loader processes; see `choose_num_workers`.
        pin_memory: for transfers to a GPU.
        finish: applied to each micro batch in the loader processes.
        loading: "exact": Pillow for all files. "fast": JPEG files by `TrainTransform.from_jpeg`, stored pixels by
            `from_region`. "direct": as "fast", and all images are resized to the stage's size instead of to image_size.
            Both decode other images as "exact" does.
        num_repeats: times that an image is shown in a row.
        shuffle_block: neighbours that stay together, see `ImageOrder`.
        weights: of the parts of a `ConcatSource`, see `WeightedOrder`; (): all images are shown equally often.
    Raises:
        UserError: if the package that "fast" and "direct" need is missing.
    """
    is_colour = source.decoding.is_picture and source.decoding.num_channels == 3
    if loading != "exact" and as_regions(source) is None and is_colour:
        check_available()
        with contextlib.suppress(BadImageError):
            if source.read(0) is None:
                log.info("the training images are not files, so data.loading = %r has no effect on decoding", loading)
    order = (
        WeightedOrder([len(part) for part in parts_of(source)], weights, seed, shuffle_block)
        if weights
        else ImageOrder(plan.dataset_size, seed, shuffle_block)
    )
    sizes = buffer_sizes(plan, loading == "direct", num_workers, source.decoding.pixel_bytes)
    buffers = BatchBuffers(sizes.num_slots, sizes.slot_bytes, shared=num_workers > 0)
    return DataLoader(
        _StreamDataset(source, transform, seed, loading, buffers, finish, in_blocks=shuffle_block > 1),
        batch_sampler=_WithSlots(_MicroBatches(plan, order, first_step, rank, num_repeats), buffers),
        num_workers=num_workers,
        collate_fn=_the_batch if num_workers else _received,
        pin_memory=pin_memory,
        worker_init_fn=init_worker if num_workers else None,
        prefetch_factor=sizes.prefetch if num_workers else None,
    )


Item = TypeVar("Item")


@contextlib.contextmanager
def reading(loader: Iterable[Item]) -> Iterator[Iterator[Item]]:
    """Iterates over a loader, and ends its worker processes when the block ends.

    The workers ignore SIGTERM (see `init_worker`), so an interpreter that exits while they run would wait forever.

    Raises:
        DataError: of a worker, with its message alone: PyTorch would put the worker's traceback before it.
    """
    batches = iter(loader)
    try:
        yield batches
    except DataError as error:
        _, marker, message = str(error).rpartition(f"{DataError.__module__}.{DataError.__qualname__}: ")
        if not marker:
            raise
        raise DataError(message.strip()) from None
    finally:
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


def choose_num_workers(configured: int | None, num_local_processes: int, on_gpu: bool) -> int:
    """Returns how many loader processes each training process starts: `configured`, or a number from the cores.

    On a GPU: its share of the cores, up to 16. On a CPU the step itself needs the cores, so one worker reads ahead.
    """
    if configured is not None:
        return configured
    cores = available_cores()
    if on_gpu:
        return max(1, min(16, cores // num_local_processes))
    return 1 if cores > 1 else 0


def _the_batch(batches: list[Batch]) -> Batch:
    return batches[0]


def _received(batches: list[Batch]) -> Batch:
    batch = batches[0]
    return batch.received() if isinstance(batch, SlotBatch) else batch


def init_worker(_: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach every process of the group; the training process handles them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Stream(Protocol):
    """The training images of one process, as the trainer reads them.

    Attributes:
        refilled_images: images that the last `open` read again to restore a buffer.
        refill_seconds: the time that it took.
    """

    refilled_images: int
    refill_seconds: float

    def open(self, step: int, stop_requested: Callable[[], bool]) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """Gives the micro batches from a step on, and ends the loader's processes at the end of the block.

        Args:
            step: the first step whose micro batches are wanted.
            stop_requested: ends the restoring of a buffer early.
        """
        ...


class ImageStream:
    """A stream without a buffer.

    Args:
        make_loader: first step -> micro batches from that step on.
    """

    refilled_images, refill_seconds = 0, 0.0

    def __init__(self, make_loader: Callable[[int], Iterable[Batch]]) -> None:
        self.make_loader = make_loader

    @contextlib.contextmanager
    def open(self, step: int, stop_requested: Callable[[], bool]) -> Iterator[Iterator[Batch]]:
        with reading(self.make_loader(step)) as batches:
            yield batches
