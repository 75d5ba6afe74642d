"""Finds images that a training and a validation set share."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mae_et.data.arrays import ImageArray
from mae_et.data.decoding import BadImageError
from mae_et.data.sources.generated import SceneSource
from mae_et.data.sources.source import ImageSource, parts_of

MAX_NAMES = 1_000_000  # images whose paths are compared
MAX_COMPARED = 2000  # training images whose content is read
MAX_SIZED = 20_000  # training images whose file size is looked up


@dataclass(frozen=True)
class Overlap:
    """Shared images of a training and a validation set."""

    num_paths: int  # training images whose paths were compared
    num_same_paths: int  # validation images that are the same files as training images
    num_same_contents: int  # validation images of the sample with a copy among the compared training images
    num_sampled: int  # validation images whose content was compared
    num_compared: int  # training images whose content was compared
    num_candidates: int  # training images of the same file size as one of the sample
    num_sized: int  # training images whose file size was looked up
    examples: tuple[str, ...]  # names of shared validation images


def find_overlap(train: ImageSource, val: ImageSource, num_sampled: int) -> Overlap:
    """Compares paths, and the content of a sample.

    Files are equal only if their sizes are, so only training images of the same size as a sampled validation image are
    read. Above `MAX_NAMES`, `MAX_SIZED` and `MAX_COMPARED` images, evenly spread ones are taken.

    Args:
        train: training images.
        val: validation images.
        num_sampled: number of validation images whose content is compared, evenly spread.
    Returns:
        The counts.
    """
    identities = {identity: index for index, identity in enumerate(_identities(val))}
    num_paths = min(len(train), MAX_NAMES)
    same = {identities[identity] for identity in _identities(train) if identity in identities}
    examples = [val.name(index) for index in sorted(same)[:3]]
    if any(isinstance(part, SceneSource) for source in (train, val) for part in parts_of(source)):
        # Names identify scenes, and painting takes time.
        return Overlap(num_paths, len(same), 0, 0, 0, 0, 0, tuple(examples))

    sampled = [index for index in evenly_spread(len(val), num_sampled) if index not in same]
    wanted: dict[bytes, int] = {}
    for index in sampled:
        if (digest := _digest(val, index)) is not None:
            wanted[digest] = index
    sizes = {size for index in sampled if (size := val.size(index)) is not None}
    sized = evenly_spread(len(train), MAX_SIZED)
    candidates = [index for index in sized if (size := train.size(index)) is None or size in sizes]
    chosen = [candidates[place] for place in evenly_spread(len(candidates), MAX_COMPARED)]
    found = {wanted[digest] for index in chosen if (digest := _digest(train, index)) in wanted}
    examples += [val.name(index) for index in sorted(found)[:3]]
    counts = (len(same), len(found), len(sampled), len(chosen), len(candidates), len(sized))
    return Overlap(num_paths, *counts, tuple(examples[:3]))


def evenly_spread(num_images: int, num_wanted: int) -> list[int]:
    """Returns the indices of at most `num_wanted` images from first to last."""
    if num_wanted >= num_images:
        return list(range(num_images))
    return np.linspace(0, num_images - 1, num_wanted).round().astype(np.int64).tolist()


def _identities(source: ImageSource) -> Iterator[str]:
    """Yields the names of up to `MAX_NAMES` images, with links in their folders resolved."""
    resolved = functools.lru_cache(maxsize=1024)(os.path.realpath)
    for index in evenly_spread(len(source), MAX_NAMES):
        folder, slash, base = source.name(index).rpartition("/")
        yield f"{resolved(folder)}/{base}" if slash else base


def _digest(source: ImageSource, index: int) -> bytes | None:
    """Returns the SHA-256 of an image's file, or of its pixels where it has none; None if it cannot be read."""
    try:
        content = source.read(index)
        if content is None:
            image = source.load(index)
            content = (image.read() if isinstance(image, ImageArray) else image).tobytes()
        return hashlib.sha256(content).digest()
    except BadImageError:
        return None
