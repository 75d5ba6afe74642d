"""Measures a masked autoencoder on held-out images without labels: reconstruction loss, RankMe, alpha-ReQ.

Shapes: n images of a batch, C channels, S px, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mae_et.data.sources.source import ImageSource
from mae_et.data.stream import choose_num_workers
from mae_et.engine.loggers import Loggers
from mae_et.evaluation.collect import BATCH_SIZE, collect
from mae_et.evaluation.label_free import alpha_req, rank_me
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.sizes import count_patches
from mae_et.runs.folder import spread
from mae_et.tasks.masks import place_noise

if TYPE_CHECKING:
    from mae_et.tasks.pretrain import MAETask

MASK_SEED = 0  # the same masks in all runs
# The last values in summary.json, and their names in the log after "val/".
LABEL_FREE = {"held_out_loss": "loss", "rankme": "rankme", "alpha_req": "alpha_req"}


class LabelFreeHook:
    """Held-out loss, RankMe and alpha-ReQ of the mean patch feature, always at full image size.

    They need images only, and are measured every `run.label_free_interval` steps, before the first and after the last step,
    on evenly spread images of data.val, `run.knn_max_images` at most. An image costs a masked forward pass and one of the
    encoder on all patches, about as much as the training step of one image.
    """

    def __init__(self, task: MAETask, source: ImageSource) -> None:
        self.task, self.source = task, source

    def due(self, step: int) -> bool:
        interval = self.task.config.run.label_free_interval
        return interval is not None and (step in (0, self.task.plan.num_steps) or step % interval == 0)

    def __call__(self, step: int, writer: Loggers | None) -> dict[str, float]:
        task = self.task
        measured_loss = _loss_function(task, self.source)

        def measure(inputs: Tensor) -> Tensor:
            features = task.judged.features(inputs)[:, 1:].mean(dim=1)  # type: ignore[call-overload]
            return torch.cat([measured_loss(inputs), features], dim=1)

        found = _collect(task, self.source, measure)
        features = found[:, 1:]
        return {
            "val/loss": float(found[:, 0].double().mean()),
            "val/rankme": rank_me(features),
            "val/alpha_req": alpha_req(features),
        }


def held_out_loss(task: MAETask, source: ImageSource) -> float:
    """Returns the mean loss at full image size on evenly spread images, `run.knn_max_images` at most.

    The mask of an image follows from its place among them, so all runs are measured with the same masks.
    """
    return float(_collect(task, source, _loss_function(task, source)).double().mean())


def _indices(task: MAETask, source: ImageSource) -> Tensor:
    return torch.from_numpy(spread(len(source), task.config.run.knn_max_images))


def _loss_function(task: MAETask, source: ImageSource) -> Callable[[Tensor], Tensor]:
    """Returns a function of successive batches of this process: [n, C, S, S] normalised -> [n, 1], their mean loss."""
    world, num_patches = task.world, count_patches(task.config.data.image_size, task.model.patch_size)
    places = torch.arange(len(_indices(task, source)))
    first = int(next(iter(world.share(places, BATCH_SIZE)), torch.tensor(0)))

    def loss(inputs: Tensor) -> Tensor:
        nonlocal first
        num = len(inputs)
        noise = place_noise(torch.arange(first, first + num, device=inputs.device), num_patches, MASK_SEED)
        first += num
        return task.judged(inputs, task.config.model.mask_ratio, noise)[0].expand(num, 1)

    return loss


def _collect(task: MAETask, source: ImageSource, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies a function of normalised images to the held-out images of all processes."""
    config, world = task.config, task.world
    data = config.data
    workers = choose_num_workers(data.num_workers, world.local_size, world.device.type == "cuda")

    def prepared(images: Tensor) -> Tensor:
        return function(crop_and_normalize(images, data.image_size, data.mean, data.std, config.curriculum.centered))

    return collect(prepared, source, _indices(task, source).numpy(), data, world, workers).outputs
