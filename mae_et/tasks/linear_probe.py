"""Probes that are trained on a frozen encoder: linear and attentive."""

from __future__ import annotations

from pathlib import Path

from mae_et.config.schema import ClassifyConfig
from mae_et.curriculum.cost import ModelCost, attentive_probe_cost, vit_cost
from mae_et.curriculum.plan import Plan
from mae_et.engine.distributed import World
from mae_et.errors import ConfigError
from mae_et.tasks.classification import ClassificationTask
from mae_et.tasks.run import TaskData


class LinearProbeTask(ClassificationTask):
    """Trains a linear layer on frozen features; arguments as for ClassificationTask.

    Raises:
        ConfigError: if a micro batch holds one image, of which BatchNorm has no statistics.
    """

    @classmethod
    def cost(cls, config: ClassifyConfig) -> ModelCost:
        return vit_cost(config.model, backward_factor=1)

    def __init__(self, config: ClassifyConfig, data: TaskData, plan: Plan, world: World, work_dir: Path) -> None:
        if any(stage.micro_batch_size == 1 for stage in plan.stages):
            raise ConfigError(
                [
                    "the linear probe's BatchNorm needs at least 2 images at once: raise the batch or batch.micro_batch_size"
                ]
            )
        super().__init__(config, data, plan, world, work_dir)


class AttentiveProbeTask(ClassificationTask):
    """Trains a query, its attention and a linear layer on frozen patches; arguments as for ClassificationTask."""

    @classmethod
    def cost(cls, config: ClassifyConfig) -> ModelCost:
        return attentive_probe_cost(config.model)
