"""Logs the reconstruction error by frequency band while a masked autoencoder trains."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mae_et.config.filters import num_bands_at
from mae_et.data.eval_loader import eval_loader
from mae_et.data.sources.source import ImageSource
from mae_et.engine.loggers import Loggers
from mae_et.evaluation.bands import band_errors
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.sizes import count_patches
from mae_et.runs.folder import spread
from mae_et.tasks.masks import place_noise

if TYPE_CHECKING:
    from mae_et.tasks.pretrain import MAETask

NUM_IMAGES, CHUNK = 128, 32
EARLY = (0.0, 0.01, 0.02, 0.05)  # fractions of the compute; the tenths follow


class BandHook:
    """Error of the predicted pixels by radial band, over the power to predict, on fixed images under fixed masks.

    Always at full image size, on unfiltered images, so that all runs and all stages are measured alike. It runs at the start,
    after 1, 2 and 5% of the compute, after each tenth, and together with each picture and kNN accuracy. One measurement
    costs two forward passes of 128 images at full size, about as much as the training step of 85 images.
    """

    def __init__(self, task: MAETask, source: ImageSource) -> None:
        self.task, self.source = task, source
        plan, tenths = task.plan, [tenth / 10 for tenth in range(1, 11)]
        all_steps = range(plan.num_steps + 1)
        self.steps = {bisect_left(all_steps, done - 1e-9, key=plan.compute_fraction) for done in (*EARLY, *tenths)}
        self.parts: list[tuple[Tensor, Tensor]] | None = None  # images [n, C, H, W] uint8 and their indices [n]

    def due(self, step: int) -> bool:
        return step in self.steps or any(hook.due(step) for hook in self.task.hooks if hook is not self)

    def __call__(self, step: int, writer: Loggers | None) -> dict[str, float]:
        config, model, world = self.task.config, self.task.judged, self.task.world
        data = config.data
        if self.parts is None:
            self.parts = self._load()
        num_bands = num_bands_at(data.image_size)
        num_patches = count_patches(data.image_size, model.patch_size)
        rows = [torch.empty(0, 2, num_bands, device=world.device)]
        for images, indices in self.parts:
            inputs = crop_and_normalize(
                images.to(world.device), data.image_size, data.mean, data.std, config.curriculum.centered
            )
            noise = place_noise(indices.to(world.device), num_patches, seed=0)
            rows.append(band_errors(model, inputs, config.model.mask_ratio, noise, data.std, num_bands))
        error, power = world.gather_rows(torch.cat(rows)).double().sum(dim=0).tolist()
        # A band without power, as in images of one colour, has no ratio.
        return {f"val/band_error_{k}": error[k] / power[k] for k in range(num_bands) if power[k]}

    def _load(self) -> list[tuple[Tensor, Tensor]]:
        """Reads this process's images; unreadable ones are left out."""
        data = self.task.config.data
        own = self.task.world.share(spread(len(self.source), NUM_IMAGES), CHUNK)
        loader = eval_loader(self.source, own, data.image_size, CHUNK, crop_ratio=data.eval_crop_ratio)
        return [(batch.images, batch.places) for batch in loader if len(batch.images)]
