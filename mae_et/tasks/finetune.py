"""Fine-tuning of a backbone with a linear head, all weights trained."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mae_et.config.schema import ClassifyConfig, RegularizationConfig
from mae_et.curriculum.plan import Plan
from mae_et.data.buffers import Batch
from mae_et.data.transforms import sample_rng
from mae_et.engine.distributed import World
from mae_et.errors import ConfigError
from mae_et.tasks.classification import ClassificationTask
from mae_et.tasks.run import TaskData

_BATCH_STREAM = 1 << 63  # keeps the draws of a batch apart from those of its first image's augmentation


class FinetuneTask(ClassificationTask):
    """Trains all weights; arguments as for ClassificationTask.

    Raises:
        ConfigError: if mixup or cutmix, which pair the images, get odd micro batches.
    """

    def __init__(self, config: ClassifyConfig, data: TaskData, plan: Plan, world: World, work_dir: Path) -> None:
        options = config.regularization
        if options.mixup or options.cutmix:
            _check_even(config, plan)
        super().__init__(config, data, plan, world, work_dir)
        if options.ema_decay is not None:
            self.ema = ModelEmaV3(self.model, decay=options.ema_decay)
        self.finetune_loss = FinetuneLoss(options, len(self.class_names), config.run.seed, world.device)

    def loss(self, model: nn.Module, images: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.finetune_loss(model, images, batch), {}


class FinetuneLoss:
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


def _check_even(config: ClassifyConfig, plan: Plan) -> None:
    odd = [stage for stage in plan.stages if stage.micro_batch_size % 2]
    if odd:
        raise ConfigError(
            [
                f"mixup and cutmix need even micro batches, but batch.global_batch_size = {config.batch.global_batch_size} "
                f"over {plan.world_size} processes and {odd[0].accum_steps} accumulation steps gives "
                f"{odd[0].micro_batch_size} images: change batch.global_batch_size or batch.micro_batch_size"
            ]
        )
