"""Applies a network to fixed images on all processes and gathers its outputs.

Shapes: M readable images, m those of this process, n images of a batch, C channels, S px, D values of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mae_et.config.schema import DataConfig
from mae_et.data.eval_loader import eval_loader
from mae_et.data.sources.source import ImageSource
from mae_et.data.stream import reading
from mae_et.engine.distributed import World
from mae_et.errors import DataError

BATCH_SIZE = 256


@dataclass
class Collected:
    """The outputs of a network for the readable images, in the order of the images."""

    outputs: Tensor  # [M, D] float32, on the world's device; without `gather` [m, D], those of this process
    labels: Tensor  # [M] int64, on the world's device; -1 where there are none
    batch_sizes: list[int]  # readable images in each batch of this process
    bad_images: dict[int, str]  # index -> reason; these are in neither of the above


@torch.inference_mode()
def collect(
    function: Callable[[Tensor], Tensor],
    source: ImageSource,
    indices: Sequence[int] | np.ndarray,
    data: DataConfig,
    world: World,
    num_workers: int = 0,
    title: str | None = None,
    gather: bool = True,
) -> Collected:
    """Applies a function to centre-cropped images.

    This is a collective operation: every process must call it with the same arguments. The images are split into whole
    batches, so each batch, and with it each output, is the same for any number of processes.

    Args:
        function: [n, C, S, S] uint8 on the world's device -> [n, D]. It must not communicate between processes, because
            they call it different numbers of times.
        source: the images.
        indices: of the images to use.
        data: image_size S and eval_crop_ratio.
        world: this process among the others.
        num_workers: loader processes.
        title: of the progress bar, which counts the main process's images; None: no bar.
        gather: if false, each process keeps the outputs of its own images only; labels are always those of all images.
    Returns:
        The outputs in the order of the indices.
    Raises:
        DataError: on every process, if none of the images can be read.
    """
    own = world.share(np.asarray(indices), BATCH_SIZE)
    rows, labels, batch_sizes, bad = torch.empty(0, device=world.device), [], [], {}
    num_rows = 0
    loader = eval_loader(source, own, data.image_size, BATCH_SIZE, num_workers, data.eval_crop_ratio)
    hidden = None if title and world.is_main else True  # None: hidden where there is no terminal
    with reading(loader) as batches, tqdm(total=len(own), desc=title, disable=hidden) as bar:
        for batch in batches:
            bad.update({image.index: image.reason for image in batch.bad_images})
            if num := len(batch.images):
                outputs = function(batch.images.to(world.device, non_blocking=True))
                if not num_rows:  # one tensor from the start: joined parts would take twice the memory
                    rows = torch.empty(len(own), *outputs.shape[1:], device=world.device)
                rows[num_rows : num_rows + num] = outputs
                num_rows += num
                labels.append(batch.labels)
                batch_sizes.append(num)
            bar.update(len(batch.labels) + len(batch.bad_images))
    bad = {index: reason for part in world.gather(bad) for index, reason in part.items()}
    rows = rows[:num_rows]
    classes = torch.cat(labels).to(world.device) if labels else torch.empty(0, dtype=torch.int64, device=world.device)
    outputs = world.gather_rows(rows) if gather else rows
    seen = Collected(outputs, world.gather_rows(classes), batch_sizes, bad)
    if not len(seen.labels):
        index, reason = next(iter(bad.items()))
        raise DataError(f"none of the {len(indices)} images can be read, e.g. {source.name(index)}: {reason}")
    return seen
