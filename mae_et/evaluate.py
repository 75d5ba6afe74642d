"""Runs a network over fixed images: for features, for accuracies.

Shapes: M images, D values of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mae_et.config import DataConfig
from mae_et.data.loader import eval_loader, reading
from mae_et.data.sources import ImageSource
from mae_et.errors import DataError

BATCH_SIZE = 256


@dataclass
class Collected:
    """What a network said of the readable images."""

    outputs: Tensor  # [M, D] float32, on the device
    labels: Tensor  # [M] int64, on the device; -1 where there are none
    bad_images: dict[int, str]  # index -> reason; these are in neither of the above


@torch.inference_mode()
def collect(
    function: Callable[[Tensor], Tensor],
    source: ImageSource,
    indices: Sequence[int] | np.ndarray,
    data: DataConfig,
    device: torch.device,
    num_workers: int = 0,
    batch_size: int = BATCH_SIZE,
    title: str | None = None,
) -> Collected:
    """Applies a function to centre-cropped images.

    Args:
        function: [n, C, S, S] uint8 on the device -> [n, D].
        source: the images.
        indices: which ones.
        data: image_size S and eval_crop_ratio.
        device: where to compute.
        num_workers: loader processes.
        batch_size: n at most.
        title: of the progress bar; None: no bar.
    Returns:
        Outputs in the order of the indices.
    Raises:
        DataError: if none of the images can be read.
    """
    outputs, labels, bad = [], [], {}
    loader = eval_loader(source, indices, data.image_size, batch_size, num_workers, data.eval_crop_ratio)
    with reading(loader) as batches, tqdm(total=len(indices), desc=title, disable=None if title else True) as bar:
        for batch in batches:
            bad.update({image.index: image.reason for image in batch.bad_images})
            if len(batch.images):
                outputs.append(function(batch.images.to(device, non_blocking=True)).float())
                labels.append(batch.labels)
            bar.update(len(batch.labels) + len(batch.bad_images))
    if not outputs:
        index, reason = next(iter(bad.items()))
        raise DataError(f"none of the {len(indices)} images can be read, e.g. {source.name(index)}: {reason}")
    return Collected(torch.cat(outputs), torch.cat(labels).to(device), bad)
