"""The loss of a classifier with random erasing, mixup, cutmix and label smoothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from mae_et.config.schema import RegularizationConfig
from mae_et.curriculum.plan import Plan
from mae_et.data.buffers import Batch
from mae_et.data.transforms import sample_rng
from mae_et.errors import ConfigError

_BATCH_STREAM = 1 << 63  # keeps the draws of a batch apart from those of its first image's augmentation


class RegularizedLoss:
    """Cross-entropy with random erasing, mixup and cutmix. What is drawn for a batch follows from its place in the stream.

    Args:
        options: which of them, and how strong.
        num_classes: of the head.
        seed: of the draws.
        device: of the images.
    """

    def __init__(self, options: RegularizationConfig, num_classes: int, seed: int, device: torch.device) -> None:
        self.seed, smoothing = seed, options.label_smoothing
        self.mixup = self.erase = None
        self.label_smoothing = smoothing
        if options.mixup or options.cutmix:
            self.mixup = Mixup(options.mixup, options.cutmix, label_smoothing=smoothing, num_classes=num_classes)
            self.label_smoothing = 0.0  # mixed targets are smooth already
        if options.erasing:
            self.erase = RandomErasing(options.erasing, mode="pixel", device=str(device))

    def __call__(self, model: nn.Module, images: Tensor, batch: Batch) -> Tensor:
        targets = batch.labels
        with sample_rng(self.seed * 0x9E3779B1 + int(batch.first_place) + _BATCH_STREAM):
            if self.erase is not None:
                images = self.erase(images)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
        return F.cross_entropy(model(images).float(), targets, label_smoothing=self.label_smoothing)


def check_even(options: RegularizationConfig, plan: Plan) -> None:
    """Checks that mixup and cutmix, which mix pairs of images, get even micro batches.

    Raises:
        ConfigError: if a micro batch is odd.
    """
    odd = [stage for stage in plan.stages if stage.micro_batch_size % 2]
    if odd and (options.mixup or options.cutmix):
        stage = odd[0]
        raise ConfigError(
            [
                f"mixup and cutmix need even micro batches, but a batch of {stage.global_batch_size} images over "
                f"{plan.world_size} processes and {stage.accum_steps} accumulation steps gives {stage.micro_batch_size} "
                "images: change batch.global_batch_size or batch.micro_batch_size"
            ]
        )
