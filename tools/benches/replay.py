"""A replayed batch: uint8 ring against the list of half-precision chunks that the curriculum's authors released."""

from __future__ import annotations

import random

import numpy as np
import torch
from benches.lowfreq import MEAN, STD
from benches.measuring import Comparison, Variants, check_equal, compare, measure
from benches.memory import compare_memory
from torch import Tensor

from mae_et.data.replay import ReplayBuffer
from mae_et.lowfreq import normalize

BANDWIDTH, FACTOR, NUM_IMAGES = 96, 4, 512
LOADER_BATCH = NUM_IMAGES // FACTOR
NUM_CHUNKS = 32  # of a loader batch
CHUNK_SIZE = LOADER_BATCH // NUM_CHUNKS


class HalfPrecisionList:
    """The released way, from its description: chunks of normalised images in half precision, first in, first out.

    Args:
        room: chunks.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.chunks: list[Tensor] = []

    def insert(self, images: Tensor) -> list[Tensor]:
        """Adds normalised float32 images; returns their chunks."""
        new = list(images.half().chunk(NUM_CHUNKS))
        self.chunks = [*self.chunks, *new][-self.room :]
        return new

    def assemble(self, new: list[Tensor]) -> Tensor:
        """The fresh chunks and as many drawn ones as make NUM_IMAGES."""
        return torch.cat([*new, *random.choices(self.chunks, k=(FACTOR - 1) * NUM_CHUNKS)])


def our_batch(buffer: ReplayBuffer, fresh: Tensor, rng: np.random.Generator) -> Tensor:
    """Fresh uint8 images into the ring, and NUM_IMAGES of it, uint8."""
    labels = torch.zeros(LOADER_BATCH, dtype=torch.int64)
    buffer.insert(fresh, labels, labels)
    drawn = buffer.draw(NUM_IMAGES - LOADER_BATCH, CHUNK_SIZE, rng)
    return buffer.gather(np.concatenate([np.arange(buffer.end - LOADER_BATCH, buffer.end), drawn]))[0]


def bench_replay(rounds: int, num_batches: int = 60) -> list[Comparison]:
    """Times a step's batch with both buffers full; `num_batches` loader batches are far more than caches hold."""
    shape = (LOADER_BATCH, 3, BANDWIDTH, BANDWIDTH)
    buffer, reference = (
        ReplayBuffer(num_batches * LOADER_BATCH * 3 * BANDWIDTH**2),
        HalfPrecisionList(num_batches * NUM_CHUNKS),
    )
    buffer.reset(num_batches * LOADER_BATCH, 3, (BANDWIDTH, BANDWIDTH))
    for _ in range(num_batches):
        fresh = torch.randint(0, 256, shape, dtype=torch.uint8)
        buffer.insert(fresh, *torch.zeros(2, LOADER_BATCH, dtype=torch.int64))
        fresh_floats = normalize(fresh, MEAN, STD)
        reference.insert(fresh_floats)
    rng = np.random.default_rng(0)
    ours = normalize(our_batch(buffer, fresh, rng), MEAN, STD)[:LOADER_BATCH]
    theirs = reference.assemble(reference.insert(fresh_floats)).float()[:LOADER_BATCH]
    check_equal("fresh images", ours, theirs, 1e-3)

    out = torch.empty(NUM_IMAGES, *shape[1:])  # as the training loop reuses it on a CPU
    variants: Variants = {
        "uint8": lambda: our_batch(buffer, fresh, rng),
        "half": lambda: reference.assemble(reference.insert(fresh_floats)),
        "uint8, floats": lambda: normalize(our_batch(buffer, fresh, rng), MEAN, STD, out),
        "half, floats": lambda: reference.assemble(reference.insert(fresh_floats)).float(),
        "half, floats, output reused": lambda: out.copy_(reference.assemble(reference.insert(fresh_floats))),
    }
    times = measure(variants, rounds)
    held = {
        "uint8": buffer.pixels.nbytes / 2**20,
        "half": sum(chunk.nbytes for chunk in reference.chunks) / 2**20,
    }
    title = f"{NUM_IMAGES} images at {BANDWIDTH}, R = {FACTOR}: fresh in, batch out, "
    return [
        {
            **compare(title + "normalised float32", times, "uint8, floats", "half, floats", 1.3),
            **compare_memory(held, "uint8", "half", 2.0),
        },
        compare(title + "reference reuses its output too", times, "uint8, floats", "half, floats, output reused", None),
        compare(title + "in the buffer's type, as it goes to a GPU", times, "uint8", "half", None),
    ]
