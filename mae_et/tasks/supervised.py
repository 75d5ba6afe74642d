"""Supervised training of any timm classifier under the curriculum."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_et.config.filters import FilterConfig
from mae_et.config.supervised import SupervisedConfig
from mae_et.curriculum.cost import ModelCost
from mae_et.curriculum.plan import Plan
from mae_et.data.buffers import Batch
from mae_et.engine.distributed import World
from mae_et.engine.parallel import build_on_device, is_without_values, moving_average
from mae_et.engine.progress import Progress
from mae_et.models.resize import change_input_size
from mae_et.models.sizes import Size
from mae_et.runs.provenance import describe_weights
from mae_et.runs.records import SupervisedSummary
from mae_et.tasks.classification import EvalHook, LabelledTask
from mae_et.tasks.filtering import filtered_for_training
from mae_et.tasks.regularization import RegularizedLoss, check_even
from mae_et.tasks.run import TaskData, run_training
from mae_et.tasks.supervised_model import build_model, build_optimizer, check_batch_norm, timm_cost
from mae_et.tasks.supervised_weights import initial_file, load_initial_weights, make_metadata, write_files


class SupervisedTask(LabelledTask):
    """Trains a classifier from the small images of the first stage to the full size of the last one.

    Args:
        config: of the run.
        data: of the run, with labels; validation images are optional.
        plan: of the run.
        world: this process among the others.
        work_dir: gets classifier.safetensors, backbone.safetensors, per_class.csv, confusion.csv and confusion.png.
    Raises:
        ConfigError: if mixup gets odd micro batches, or BatchNorm a single image.
        UserError: if the model cannot take images of the bandwidths.
    """

    kind = "supervised"
    summary_type = SupervisedSummary
    config: SupervisedConfig

    @classmethod
    def cost(cls, config: SupervisedConfig) -> ModelCost:
        return timm_cost(config)

    def __init__(self, config: SupervisedConfig, data: TaskData, plan: Plan, world: World, work_dir: Path) -> None:
        self.config, self.plan, self.world, self.work_dir = config, plan, world, work_dir
        self.class_names = list(data.class_names)
        check_even(config.regularization, plan)
        self.input_size = plan.stages[0].input_size
        self.model = build_on_device(
            lambda: build_model(config, len(self.class_names), self.input_size), config.run, world
        )
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.4x for a ResNet on a CPU
        check_batch_norm(self.model, plan)
        if config.regularization.ema_decay is not None:
            self.ema = moving_average(self.model, decay=config.regularization.ema_decay)
        self.optimizer = build_optimizer(config, self.model)
        self.regularized_loss = RegularizedLoss(
            config.regularization, len(self.class_names), config.run.seed, world.device
        )
        self.initial_weights = describe_weights(
            None if config.model.init_from is None else initial_file(config.model.init_from)
        )
        self.metadata = make_metadata(config, plan, self.class_names)
        self.evaluation = None if data.val is None else EvalHook(self, data.val)
        self.hooks = [] if self.evaluation is None else [self.evaluation]

    def load_initial_weights(self) -> None:
        if self.config.model.init_from is not None and not is_without_values(self.model):
            load_initial_weights(self.model, self.input_size, self.config, self.class_names)
            if self.ema is not None:
                self.ema.set(self.model)

    def enter_bandwidth(self, size: Size, optimizer: torch.optim.Optimizer) -> bool:
        self.input_size = size
        return change_input_size(self.model, optimizer, self.ema, size)

    def preprocess(self, images: Tensor, size: Size) -> Tensor:
        """Crops to the low frequencies, normalizes, and filters if the config says so. Erasing and mixup come after it."""
        data, done = self.config.data, self.plan.compute_fraction(self.step)
        inputs = filtered_for_training(super().preprocess(images, size), data.filter, data.image_size, done)
        return inputs.contiguous(memory_format=torch.channels_last)

    def val_filters(self) -> Sequence[FilterConfig]:
        return self.config.data.val_filters

    def loss(self, model: nn.Module, images: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.regularized_loss(model, images, batch), {}

    def judged_at(self, size: Size) -> nn.Module:
        if size == self.input_size:
            return self.judged
        model = copy.deepcopy(self.judged)
        change_input_size(model, None, None, size)
        return model

    def eval_sizes(self) -> dict[str, Size]:
        """Full size, and also the size of the stage while that is smaller."""
        full = super().eval_sizes()
        return full if self.input_size == self.config.data.image_size else {**full, "val/stage_": self.input_size}

    def finish(self, progress: Progress, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        verdict = self.verdict(metrics)
        if not self.world.is_main:
            return {}
        digest = write_files(self.judged_at(self.config.data.image_size), self.metadata, self.work_dir)
        return {
            "model": self.config.model.name,
            "encoder_sha256": digest,
            "num_classes": len(self.class_names),
            **verdict,
        }


def train_supervised(
    config: SupervisedConfig, work_dir: str | Path, resume: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Trains a classifier; arguments and errors as for `run_training`.

    Returns:
        The summary, as in summary.json: top1 and top5 at full size, and the cost.
    """
    return run_training(SupervisedTask, config, work_dir, resume, device)
