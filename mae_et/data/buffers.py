"""Micro batches, and the memory that loader processes fill with them: allocated once, shared, used again.

A loader process that returns a fresh tensor makes the system map, clear and copy its pages for each batch. Here the training
process owns a fixed number of slots. It names a free one with each task, the loader process writes the images into it, and
only the slot's number travels back. The slot is free again when the last tensor that shares its memory is gone. So a consumer
may keep a batch as long as it likes: if no slot is free, a batch travels in memory of its own.
"""

from __future__ import annotations

import itertools
import math
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae_et.curriculum.plan import Plan
from mae_et.errors import UserError

MAX_PREFETCH = 4  # batches that each loader process has in work or finished
PREFETCH_BYTES = 1 << 30  # of all of them in a training process
HELD_BATCHES = 3  # by the training process: the one in work, the next, and one that is being received


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
    seconds: float = 0.0  # that one process took to prepare it

    def pin_memory(self) -> Batch:
        self.images, self.labels, self.places = (t.pin_memory() for t in (self.images, self.labels, self.places))
        return self

    def to(self, device: torch.device) -> Batch:
        """Moves the tensors; asynchronously from pinned memory."""
        images, labels, places = (t.to(device, non_blocking=True) for t in (self.images, self.labels, self.places))
        showings = None if self.showings is None else self.showings.to(device, non_blocking=True)
        return Batch(images, labels, places, self.bad_images, self.first_place, showings)


class BatchBuffers:
    """Slots of equal size for the images of batches.

    Args:
        num_slots: batches that are in work, finished or held by the consumer at once.
        slot_bytes: of the largest batch.
        shared: whether other processes fill them.
    """

    def __init__(self, num_slots: int, slot_bytes: int, shared: bool) -> None:
        num_bytes = num_slots * slot_bytes
        # Pages are taken as they are written. (Tensor.share_memory_ would write them all.)
        storage = torch.UntypedStorage._new_shared(num_bytes) if shared else torch.UntypedStorage(num_bytes)
        self.storage = torch.empty(0, dtype=torch.uint8).set_(storage).view(num_slots, slot_bytes)
        self.slot_bytes = slot_bytes
        self.number = next(_numbers)
        _alive[self.number] = self
        self.free = list(range(num_slots))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "free"}

    def take(self) -> int | None:
        """Returns a free slot, or None if there is none."""
        return self.free.pop() if self.free else None

    def view(self, slot: int | None, shape: tuple[int, ...]) -> Tensor | None:
        """Returns the beginning of a slot as an uint8 tensor; None if there is no slot or it is too small."""
        num_bytes = int(np.prod(shape))
        if slot is None or num_bytes > self.slot_bytes:
            return None
        return self.storage[slot, :num_bytes].view(shape)

    def lend(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """Returns the beginning of a slot as a tensor; the slot is free again when its memory is no longer used."""
        return torch.from_numpy(np.asarray(_Lease(self, slot, shape)))


# A slot that arrives from a loader process names its buffers by number.
_numbers = itertools.count()
_alive: weakref.WeakValueDictionary[int, BatchBuffers] = weakref.WeakValueDictionary()


class _Lease:
    """Memory of a slot. numpy and torch keep a reference to it as long as any of their views lives."""

    def __init__(self, buffers: BatchBuffers, slot: int, shape: tuple[int, ...]) -> None:
        self.buffers, self.slot = buffers, slot
        address = buffers.storage[slot].data_ptr()
        self.__array_interface__ = {"shape": shape, "typestr": "|u1", "data": (address, False), "version": 3}

    def __del__(self) -> None:
        self.buffers.free.append(self.slot)


class SlotBatch(Batch):
    """A batch whose images lie in a slot. Pickled, only the slot's number travels; unpickled, it is a plain Batch."""

    buffers: BatchBuffers
    slot: int

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        # Arrays are pickled as bytes; a tensor would be put into shared memory of its own.
        labels, places = self.labels.numpy(), self.places.numpy()
        slot = (self.buffers.number, self.slot, tuple(self.images.shape))
        return _received, (*slot, labels, places, self.bad_images, self.first_place, self.seconds)

    def received(self) -> Batch:
        """Returns the batch for a consumer in this process."""
        function, arguments = self.__reduce__()
        return function(*arguments)


def _received(
    number: int,
    slot: int,
    shape: tuple[int, ...],
    labels: np.ndarray,
    places: np.ndarray,
    bad_images: list[BadImage],
    first_place: int,
    seconds: float,
) -> Batch:
    images = _alive[number].lend(slot, shape)
    tensors = (images, torch.from_numpy(labels), torch.from_numpy(places))
    return Batch(*tensors, bad_images, first_place, seconds=seconds)


class BufferSizes(NamedTuple):
    """The memory of a loader's batches."""

    num_slots: int
    slot_bytes: int
    prefetch: int  # batches that each loader process has in work or finished

    @property
    def num_bytes(self) -> int:
        return self.num_slots * self.slot_bytes


def buffer_sizes(plan: Plan, is_direct: bool, num_workers: int, channels: int) -> BufferSizes:
    """Returns how much memory the batches of one training process take.

    Loader processes read ahead up to `MAX_PREFETCH` batches each, as long as all of them together keep within
    `PREFETCH_BYTES`; one batch each is the least.

    Args:
        plan: of the run.
        is_direct: whether images are loaded at the size of their stage, not at image_size.
        num_workers: loader processes.
        channels: of the images.
    """
    sizes = [stage.input_size if is_direct else plan.image_size for stage in plan.stages]
    pairs = zip(plan.stages, sizes, strict=True)
    slot_bytes = max(stage.micro_batch_size * channels * math.prod(size) for stage, size in pairs)
    prefetch = max(1, min(MAX_PREFETCH, PREFETCH_BYTES // (max(1, num_workers) * slot_bytes)))
    return BufferSizes(max(1, num_workers) * prefetch + HELD_BATCHES, slot_bytes, prefetch)


def check_shared_memory(
    plan: Plan, is_direct: bool, num_workers: int, channels: int, folder: Path = Path("/dev/shm")
) -> None:
    """Refuses loader processes whose finished batches could fill the shared memory, which would kill them.

    Args:
        plan: of the run.
        is_direct: whether images are loaded at the size of their stage.
        num_workers: loader processes of each training process.
        channels: of the images.
        folder: where the system keeps shared memory.
    Raises:
        UserError: with the sizes and the fix.
    """
    if not num_workers or not folder.is_dir():
        return
    images = max(stage.micro_batch_size for stage in plan.stages)
    needed = buffer_sizes(plan, is_direct, num_workers, channels).num_bytes * plan.local_world_size
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the loader processes need up to {needed / 2**30:.2g} GiB of shared memory ({folder}), {free / 2**30:.2g} GiB are "
            f"free: lower data.num_workers ({num_workers}) or batch.micro_batch_size ({images}), or give the container more "
            "(docker run --shm-size)"
        )
