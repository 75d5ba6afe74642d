"""Micro batches, and the memory that loader processes fill with them: allocated once, shared, used again.

A loader process that returns a fresh tensor makes the system map, clear and copy its pages for each batch. Here the training
process owns a fixed number of slots. It names a free one with each task, the loader process writes the images into it, and
only the slot's number travels back. The slot is free again when the last tensor that shares its memory is gone. So a consumer
may keep a batch as long as it likes: if no slot is free, a batch travels in memory of its own.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
        return _received, (*slot, labels, places, self.bad_images, self.first_place)

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
) -> Batch:
    images = _alive[number].lend(slot, shape)
    return Batch(images, torch.from_numpy(labels), torch.from_numpy(places), bad_images, first_place)
