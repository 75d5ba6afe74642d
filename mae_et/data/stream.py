"""The stream of training images: which image at which place with which augmentation, read by worker processes.

The stream is defined by (seed, place) alone. Place i belongs to pass i // N over the data, each pass has its own
permutation, and an image's augmentation is seeded by its place. So the stream does not depend on the number of workers or
processes, and a run can enter it at any image.

Shapes: n images of a micro batch, C channels, S image_size, B the stage's bandwidth, px.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mae_et.curriculum.plan import Plan
from mae_et.data.decoding import BadImageError
from mae_et.data.jpeg import check_available
from mae_et.data.order import ImageOrder
from mae_et.data.sources.source import ImageSource, read_ahead
from mae_et.data.transforms import EvalTransform, TrainTransform, sample_rng
from mae_et.errors import DataError, UserError
from mae_et.process import available_cores

log = logging.getLogger(__name__)

Loading = Literal["exact", "fast", "direct"]
PREFETCH = 4  # finished batches of each loader process
MAX_REPLACEMENTS = 20  # unreadable images in a row before the loader gives up


@dataclass(frozen=True)
class Draw:
    """One image of the stream."""

    index: int  # into the data set
    place: int  # in the stream
    strength: float  # of the augmentation
    bandwidth: int  # of the stage, px


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read, and why."""

    index: int
    reason: str


@dataclass
class Batch:
    """A micro batch."""

    images: Tensor  # [n, C, S, S] uint8; [n, C, B, B] where loading is "direct"
    labels: Tensor  # [n] int64, -1 where there are none
    places: Tensor  # [n] int64, places in the stream
    bad_images: list[BadImage]  # unreadable ones, each replaced by another image
    first_place: int = 0  # the first of the places, as a number on the host
    showings: Tensor | None = None  # [n] int64, places among all images shown; None: the same as `places`

    def pin_memory(self) -> Batch:
        self.images, self.labels, self.places = (t.pin_memory() for t in (self.images, self.labels, self.places))
        return self

    def to(self, device: torch.device) -> Batch:
        """Moves the tensors; asynchronously from pinned memory."""
        images, labels, places = (t.to(device, non_blocking=True) for t in (self.images, self.labels, self.places))
        showings = None if self.showings is None else self.showings.to(device, non_blocking=True)
        return Batch(images, labels, places, self.bad_images, self.first_place, showings)


class _StreamDataset(Dataset):
    def __init__(
        self, source: ImageSource, transform: TrainTransform, seed: int, loading: Loading, in_blocks: bool = False
    ) -> None:
        self.source, self.transform, self.seed, self.loading = source, transform, seed, loading
        self.in_blocks = in_blocks

    def __getitems__(self, draws: list[Draw]) -> list[tuple[Tensor, int, int, list[BadImage]]]:
        """Returns a micro batch; DataLoader calls this instead of `__getitem__` where it exists."""
        read_ahead(self.source, [draw.index for draw in draws], only_always=not self.in_blocks)
        return [self[draw] for draw in draws]

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int, int, list[BadImage]]:
        index, bad = draw.index, []
        for attempt in range(MAX_REPLACEMENTS + 1):
            try:
                pixels = self._prepare(index, draw)
                break
            except BadImageError as error:
                bad.append(BadImage(index, str(error)))
                index = int(np.random.default_rng((self.seed, draw.place, attempt)).integers(len(self.source)))
        else:
            return torch.empty(0), -1, draw.place, bad  # the training process stops the run
        labels = self.source.labels
        return pixels, -1 if labels is None else int(labels[index]), draw.place, bad

    def _prepare(self, index: int, draw: Draw) -> Tensor:
        side = draw.bandwidth if self.loading == "direct" else None
        content = None if self.loading == "exact" else self.source.read(index)
        if content is not None:
            with self._rng(draw):
                pixels = self.transform.from_jpeg(content, draw.strength, side, self.source.decoding.max_pixels)
            if pixels is not None:
                return pixels
        image = self.source.load(index)
        with self._rng(draw):
            return self.transform(image, draw.strength, side)

    def _rng(self, draw: Draw) -> contextlib.AbstractContextManager[None]:
        return sample_rng(self.seed * 0x9E3779B1 + draw.place, self.transform.draws_from_torch_alone)


class _MicroBatches(Sampler[list[Draw]]):
    """The new images of one process, from a step to the end of the plan, in micro batches.

    With `num_repeats` R, the places R i to R i + R - 1 show the same image (repeated augmentation).
    """

    def __init__(
        self, plan: Plan, seed: int, first_step: int, rank: int, num_repeats: int = 1, block_size: int = 1
    ) -> None:
        self.plan, self.seed, self.first_step, self.rank = plan, seed, first_step, rank
        self.num_repeats, self.block_size = num_repeats, block_size

    def __iter__(self) -> Iterator[list[Draw]]:
        order = ImageOrder(self.plan.dataset_size, self.seed, self.block_size)
        for step in range(self.first_step, self.plan.num_steps):
            strength, sizes = self.plan.strength(step), self.plan.loader_batches(step)
            bandwidth = self.plan.stage_at(step).bandwidth
            place = self.plan.first_image(step) + self.rank * sum(sizes)
            for size in sizes:
                drawn = np.arange(place, place + size) // self.num_repeats
                images = order.images(int(drawn[0]), int(drawn[-1] - drawn[0]) + 1)[drawn - drawn[0]]
                yield [Draw(index, place + i, strength, bandwidth) for i, index in enumerate(images.tolist())]
                place += size


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
        num_repeats: times that an image is shown in a row.
        loading: "exact": Pillow for all files. "fast": JPEG files by `TrainTransform.from_jpeg`. "direct": as "fast", and
            all images are resized to the stage's bandwidth instead of to image_size.
        shuffle_block: neighbours that stay together, see `ImageOrder`.
    Raises:
        UserError: if the package that "fast" and "direct" need is missing.
    """
    if loading != "exact":
        check_available()
        with contextlib.suppress(BadImageError):
            if source.read(0) is None:
                log.info("the training images are not files, so data.loading = %r has no effect on decoding", loading)
    return DataLoader(
        _StreamDataset(source, transform, seed, loading, shuffle_block > 1),
        batch_sampler=_MicroBatches(plan, seed, first_step, rank, num_repeats, shuffle_block),
        num_workers=num_workers,
        collate_fn=_collate if finish is None else partial(_collate_and_finish, finish),
        pin_memory=pin_memory,
        worker_init_fn=_init_worker if num_workers else None,
        prefetch_factor=PREFETCH if num_workers else None,
    )


@contextlib.contextmanager
def reading(loader: Iterable[Batch]) -> Iterator[Iterator[Batch]]:
    """Iterates over a loader, and ends its worker processes when the block ends.

    The workers ignore SIGTERM (see `_init_worker`), so an interpreter that exits while they run would wait forever.

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


def _collate(samples: list[tuple[Tensor, int, int, list[BadImage]]]) -> Batch:
    bad_images = [image for *_, bad in samples for image in bad]
    read = [sample for sample in samples if sample[0].numel()]
    images = torch.stack([sample[0] for sample in read]) if read else torch.empty(0, dtype=torch.uint8)
    labels, places = (torch.tensor([sample[i] for sample in read], dtype=torch.int64) for i in (1, 2))
    return Batch(images, labels, places, bad_images, first_place=samples[0][2])


def _collate_and_finish(
    finish: Callable[[Batch], Batch], samples: list[tuple[Tensor, int, int, list[BadImage]]]
) -> Batch:
    return finish(_collate(samples))


def _init_worker(_: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach every process of the group; the training process handles them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _FixedImages(Dataset):
    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray, transform: EvalTransform) -> None:
        self.source, self.indices, self.transform = source, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, numbers: list[int]) -> list[tuple[Tensor, int, int, list[BadImage]]]:
        read_ahead(self.source, [int(self.indices[i]) for i in numbers], only_always=True)
        return [self[i] for i in numbers]

    def __getitem__(self, i: int) -> tuple[Tensor, int, int, list[BadImage]]:
        index = int(self.indices[i])
        try:
            pixels = self.transform(self.source.load(index))
        except BadImageError as error:
            return torch.empty(0), -1, index, [BadImage(index, str(error))]
        labels = self.source.labels
        return pixels, -1 if labels is None else int(labels[index]), index, []


def eval_loader(
    source: ImageSource,
    indices: Sequence[int] | np.ndarray,
    image_size: int,
    batch_size: int,
    num_workers: int = 0,
    crop_ratio: float = 0.875,
) -> DataLoader:
    """Returns a loader of centre-cropped images in order. Unreadable ones are left out and listed in the batch.

    Args:
        source: the images.
        indices: of the images to load.
        image_size: S in px.
        batch_size: n; batches with unreadable images are smaller.
        num_workers: loader processes.
        crop_ratio: as for EvalTransform.
    Returns:
        Batches whose `places` are the indices.
    """
    return DataLoader(
        _FixedImages(source, indices, EvalTransform(image_size, crop_ratio)),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_init_worker if num_workers else None,
        generator=torch.Generator(),  # for the workers' base seed: the global generator stays untouched
    )


def check_shared_memory(plan: Plan, num_workers: int, channels: int, folder: Path = Path("/dev/shm")) -> None:
    """Refuses loader processes whose finished batches could fill the shared memory, which would kill them.

    Args:
        plan: of the run.
        num_workers: loader processes of each training process.
        channels: of the images.
        folder: where the system keeps shared memory.
    Raises:
        UserError: with the sizes and the fix.
    """
    if not num_workers or not folder.is_dir():
        return
    images = max(stage.micro_batch_size for stage in plan.stages)
    batch = images * channels * plan.image_size**2
    needed = batch * (PREFETCH + 1) * num_workers * plan.local_world_size
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the loader processes need up to {needed / 2**30:.2g} GiB of shared memory ({folder}), {free / 2**30:.2g} GiB are "
            f"free: lower data.num_workers ({num_workers}) or batch.micro_batch_size ({images}), or give the container more "
            "(docker run --shm-size)"
        )


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
