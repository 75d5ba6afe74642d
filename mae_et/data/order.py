"""The order of the images in each pass over a data set, and the mixture of several data sets.

Each pass shows every image once, in an order that depends on (seed, pass) alone. Below `IN_MEMORY` images the order is a
permutation in memory, 8 bytes an image. From there on it is computed for each place: a Feistel network on a x b, the product
of two numbers near the square root, gives a bijection whose keys are all that is stored.

Source: generalized Feistel ciphers on arbitrary domains and cycle walking, Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", CT-RSA 2002.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mae_et.errors import DataError

IN_MEMORY = 10_000_000
_NUM_ROUNDS = 8  # even, so that the halves end where they began
_KEYS, _SHIFTS, _SOURCES = 0xFE15, 0xB10C, 0x5EED  # keep these draws apart from other uses of (seed, pass)


class ImageOrder:
    """Maps places of the stream to images.

    Args:
        num_images: N.
        seed: of the order.
        block_size: number of neighbouring images that stay together. 1: all images are shuffled one by one. Otherwise the
            blocks are shuffled, and each pass cuts them at other images. Up to block_size - 1 images are read alone.
    """

    def __init__(self, num_images: int, seed: int, block_size: int = 1) -> None:
        self.num_images, self.seed, self.block_size = num_images, seed, block_size
        self.num_blocks = -(-num_images // block_size)
        self._pass = -1
        self._blocks: np.ndarray | FeistelPermutation
        self._shift = 0

    def images(self, first_place: int, num_places: int) -> np.ndarray:
        """Returns the images [num_places] int64 at consecutive places; place i belongs to pass i // N."""
        parts = [np.empty(0, np.int64)]
        place, end = first_place, first_place + num_places
        while place < end:
            number, start = divmod(place, self.num_images)
            num = min(end - place, self.num_images - start)
            self._enter(number)
            parts.append(self._in_pass(np.arange(start, start + num)))
            place += num
        return np.concatenate(parts)

    def _enter(self, number: int) -> None:
        if number == self._pass:
            return
        self._pass = number
        if self.num_blocks < IN_MEMORY:
            self._blocks = np.random.default_rng((self.seed, number)).permutation(self.num_blocks)
        else:
            self._blocks = FeistelPermutation(self.num_blocks, (_KEYS, self.seed, number))
        if self.block_size > 1:
            self._shift = int(np.random.default_rng((_SHIFTS, self.seed, number)).integers(self.num_images))

    def _in_pass(self, places: np.ndarray) -> np.ndarray:
        if self.block_size == 1:
            return self._blocks[places]
        images = self._in_blocks(places)
        while (outside := images >= self.num_images).any():  # the last block may be short; see cycle walking below
            images[outside] = self._in_blocks(images[outside])
        return (images + self._shift) % self.num_images

    def _in_blocks(self, places: np.ndarray) -> np.ndarray:
        return self._blocks[places // self.block_size] * self.block_size + places % self.block_size


class WeightedOrder(ImageOrder):
    """Mixes several sources in given proportions. Image i of source k is image i + (images of the sources before).

    A pass has as many places as all sources have images. Each source fills its share of them, from an order of its own that
    continues through the passes: no image of a source is repeated before all others of it were shown. A pass holds 8 bytes for
    each place, and about 40 while it is drawn.

    Args:
        sizes: images of each source.
        weights: one number > 0 for each source, on any scale.
        seed, block_size: as for `ImageOrder`.
    Raises:
        DataError: if a weight is so small that a pass shows no image of its source.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, block_size: int = 1) -> None:
        super().__init__(sum(sizes), seed, block_size)
        self.sizes, self.shares = list(sizes), images_per_pass(sizes, weights)
        seeds = (int(np.random.SeedSequence((_SOURCES, seed, k)).generate_state(1)[0]) for k in range(len(sizes)))
        self._orders = [ImageOrder(size, own, block_size) for size, own in zip(sizes, seeds, strict=True)]

    def _enter(self, number: int) -> None:
        if number == self._pass:
            return
        super()._enter(number)
        slots = super()._in_pass(np.arange(self.num_images))
        sources = np.searchsorted(np.cumsum(self.shares), slots, "right")
        self._images, first = np.empty(self.num_images, np.int64), 0
        for k, (order, size, share) in enumerate(zip(self._orders, self.sizes, self.shares, strict=True)):
            self._images[sources == k] = first + order.images(number * share, share)
            first += size

    def _in_pass(self, places: np.ndarray) -> np.ndarray:
        return self._images[places]


def images_per_pass(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Returns how many places of a pass each source fills; together as many as all sources have images.

    Rounds by largest remainders. Arguments and errors as for `WeightedOrder`.
    """
    exact = np.asarray(weights, np.float64) / math.fsum(weights) * sum(sizes)
    shares = np.floor(exact).astype(np.int64)
    missing = sum(sizes) - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    if not shares.all():
        k = int(np.argmin(shares))
        raise DataError(
            f"data.train_weights[{k}] = {weights[k]:g} is {exact[k]:.2g} of the {sum(sizes)} images of a pass, so source {k} "
            "is never shown: raise the weight, or remove the source from data.train"
        )
    return shares.tolist()


class FeistelPermutation:
    """A random permutation of 0..size-1 that takes no memory; it is indexed as an array of the permuted numbers.

    Args:
        size: at least 1.
        seed: as for `numpy.random.default_rng`.
    """

    def __init__(self, size: int, seed: tuple[int, ...]) -> None:
        self.size = size
        self._a = math.isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        self._keys = np.random.default_rng(seed).integers(2**64, size=_NUM_ROUNDS, dtype=np.uint64)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Returns the numbers [n] int64 at indices [n] in 0..size-1."""
        numbers = self._encrypted(indices)
        # Cycle walking: a x b exceeds size by less than its square root. What falls outside is permuted again until it
        # falls inside, which keeps the map one to one.
        while (outside := numbers >= self.size).any():
            numbers[outside] = self._encrypted(numbers[outside])
        return numbers

    def _encrypted(self, numbers: np.ndarray) -> np.ndarray:
        left, right = np.divmod(numbers.astype(np.uint64), np.uint64(self._b))
        for left_key, right_key in zip(self._keys[::2], self._keys[1::2], strict=True):
            left = (left + _mixed(right + left_key)) % np.uint64(self._a)
            right = (right + _mixed(left + right_key)) % np.uint64(self._b)
        return (left * np.uint64(self._b) + right).astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Mixes the bits of [n] uint64 and keeps the upper 32 (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (values ^ (values >> np.uint64(31))) >> np.uint64(32)
