"""Reads images for evaluation: centre-cropped, each once, in order.

Shapes: n images of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mae_et.data.buffers import BadImage, Batch
from mae_et.data.decoding import BadImageError
from mae_et.data.sources.source import ImageSource, read_ahead
from mae_et.data.stream import init_worker
from mae_et.data.transforms import EvalTransform
from mae_et.models.sizes import Size


def eval_loader(
    source: ImageSource,
    indices: Sequence[int] | np.ndarray,
    image_size: int | Size,
    batch_size: int,
    num_workers: int = 0,
    crop_ratio: float = 0.875,
) -> DataLoader:
    """Returns a loader of centre-cropped images in order. Unreadable ones are left out and listed in the batch.

    Args:
        source: the images.
        indices: of the images to load.
        image_size: px, side or (H, W).
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
        worker_init_fn=init_worker if num_workers else None,
        generator=torch.Generator(),  # for the workers' base seed: the global generator stays untouched
    )


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


def _collate(samples: list[tuple[Tensor, int, int, list[BadImage]]]) -> Batch:
    bad_images = [image for *_, bad in samples for image in bad]
    read = [sample for sample in samples if sample[0].numel()]
    images = torch.stack([sample[0] for sample in read]) if read else torch.empty(0, dtype=torch.uint8)
    labels, places = (torch.tensor([sample[i] for sample in read], dtype=torch.int64) for i in (1, 2))
    return Batch(images, labels, places, bad_images, first_place=samples[0][2])
