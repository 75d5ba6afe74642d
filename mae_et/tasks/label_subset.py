"""Draws the labelled images of few-shot and label-fraction protocols."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mae_et.config.probes import LabelsConfig
from mae_et.data.sources.spec import some_of
from mae_et.errors import DataError


def draw_subset(labels: np.ndarray, class_names: Sequence[str], config: LabelsConfig, seed: int) -> np.ndarray:
    """Draws images of each class without replacement.

    A smaller subset of the same seed is part of a larger one, and the images of a class do not depend on other classes.

    Args:
        labels: [M] int64.
        class_names: in the order of the labels.
        config: how many images; a fraction of each class is rounded to the nearest number of images.
        seed: of the draw.
    Returns:
        [n] int64, ascending; all images if the config uses all labels.
    Raises:
        DataError: if a class has fewer images than asked for, or a fraction leaves it without images, with the classes.
    """
    if config.are_all:
        return np.arange(len(labels))
    counts = np.bincount(labels, minlength=len(class_names))
    if config.images_per_class is not None:
        wanted = np.full(len(counts), config.images_per_class)
    else:
        assert config.fraction is not None
        wanted = np.floor(config.fraction * counts + 0.5).astype(np.int64)
    _check(counts, wanted, class_names, config)
    drawn = [
        np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))[: wanted[label]]
        for label in range(len(counts))
    ]
    return np.sort(np.concatenate(drawn))


def _check(counts: np.ndarray, wanted: np.ndarray, class_names: Sequence[str], config: LabelsConfig) -> None:
    def some(classes: np.ndarray) -> str:
        return some_of([f"{class_names[label]} ({counts[label]} images)" for label in classes])

    small = np.flatnonzero(counts < wanted)
    if len(small):
        fix = f"Lower it to {counts.min()}" if counts.min() else "Remove the classes without images"
        raise DataError(
            f"labels.images_per_class = {config.images_per_class}, but {len(small)} of {len(counts)} classes of data.train have "
            f"fewer: {some(small)}. {fix}, or add images"
        )
    empty = np.flatnonzero(wanted == 0)
    if len(empty):
        least = np.ceil(500 / max(1, counts.min())) / 1000
        raise DataError(
            f"labels.fraction = {config.fraction:g} leaves {len(empty)} of {len(counts)} classes of data.train without an image: "
            f"{some(empty)}. Use at least {least:g}, or labels.images_per_class"
        )
