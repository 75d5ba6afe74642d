"""Fine-tuning of a backbone with a linear head, all weights trained."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from mae_et.config.schema import ClassifyConfig
from mae_et.curriculum.plan import Plan
from mae_et.data.buffers import Batch
from mae_et.engine.distributed import World
from mae_et.engine.parallel import moving_average
from mae_et.tasks.classification import ClassificationTask
from mae_et.tasks.regularization import RegularizedLoss, check_even
from mae_et.tasks.run import TaskData


class FinetuneTask(ClassificationTask):
    """Trains all weights; arguments as for ClassificationTask.

    Raises:
        ConfigError: if mixup or cutmix, which pair the images, get odd micro batches.
    """

    def __init__(self, config: ClassifyConfig, data: TaskData, plan: Plan, world: World, work_dir: Path) -> None:
        options = config.regularization
        check_even(options, plan)
        super().__init__(config, data, plan, world, work_dir)
        if options.ema_decay is not None:
            self.ema = moving_average(self.model, decay=options.ema_decay)
        self.regularized_loss = RegularizedLoss(options, len(self.class_names), config.run.seed, world.device)

    def loss(self, model: nn.Module, images: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.regularized_loss(model, images, batch), {}
