"""What fine-tuning and the linear probe share: labelled data, the evaluation, the classifier file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from mae_et.config.schema import ClassifyConfig
from mae_et.curriculum.cost import ModelCost, vit_cost
from mae_et.curriculum.plan import Plan
from mae_et.data.sources.source import ImageSource
from mae_et.data.sources.spec import check_same_classes, open_images, some_of
from mae_et.data.stream import Batch, choose_num_workers
from mae_et.engine.distributed import World
from mae_et.engine.precision import autocast_dtype
from mae_et.engine.progress import Progress
from mae_et.errors import DataError
from mae_et.evaluation.classification import topk_correct, write_verdict
from mae_et.evaluation.collect import Collected, collect
from mae_et.lowfreq import crop_and_normalize
from mae_et.runs.provenance import describe_weights
from mae_et.runs.records import ClassifierSummary
from mae_et.storage.backbone import write_safetensors
from mae_et.tasks.classifier import build_classifier, build_optimizer, classifier_metadata, open_backbone
from mae_et.tasks.run import TaskData, TrainingTask


class ClassificationTask(TrainingTask):
    """Trains a classifier on labelled images.

    Args:
        config: of the run.
        data: of the run, with labels.
        plan: of the run.
        world: this process among the others.
        work_dir: gets per_class.csv, confusion.csv, confusion.png and classifier.safetensors.
    """

    kind = "classify"
    summary_type = ClassifierSummary
    resumes_other_weights = False
    sees_batch_split = True  # mixup, drop path and the probe's BatchNorm see the micro batch

    @classmethod
    def open_data(cls, config: ClassifyConfig) -> TaskData:
        return open_labelled(config)

    @classmethod
    def cost(cls, config: ClassifyConfig) -> ModelCost:
        return vit_cost(config.model)

    def __init__(self, config: ClassifyConfig, data: TaskData, plan: Plan, world: World, work_dir: Path) -> None:
        self.config, self.plan, self.world, self.work_dir = config, plan, world, work_dir
        self.class_names = list(data.class_names)
        backbone = open_backbone(config)
        self.model = build_classifier(config, len(self.class_names), backbone).to(world.device)
        self.initial_weights = describe_weights(config.backbone)
        self.metadata = classifier_metadata(config, self.class_names)
        self.optimizer = build_optimizer(config, self.model)
        assert data.val is not None  # `open_data` opened it
        self.evaluation = EvalHook(self, data.val)
        self.hooks = [self.evaluation]

    @property
    def judged(self) -> nn.Module:
        """The network that is evaluated and written: the average of the weights where there is one."""
        return self.model if self.ema is None else self.ema.module

    def preprocess(self, images: Tensor, bandwidth: int) -> Tensor:
        return preprocess(images, bandwidth, self.config)

    def loss(self, model: nn.Module, images: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return F.cross_entropy(model(images).float(), batch.labels), {}

    def finish(self, progress: Progress, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        seen = self.evaluation.last or self.evaluation.collect("evaluation")  # a finished run that was resumed has none
        if not self.world.is_main:
            return {}
        write_safetensors(self.judged.state_dict(), self.work_dir / "classifier.safetensors", self.metadata)
        return {
            "kind": self.config.protocol,
            **write_verdict(seen.outputs, seen.labels, self.class_names, self.work_dir),
            "top1_history": [(line["step"], line["val/top1"]) for line in metrics if "val/top1" in line],
            "unreadable_val_images": len(seen.bad_images),
        }


class EvalHook:
    """Accuracy on data.val at the end of each tenth of the run, or every `eval_interval` steps."""

    def __init__(self, task: ClassificationTask, source: ImageSource) -> None:
        self.task, self.source = task, source
        config, world = task.config, task.world
        self.num_workers = choose_num_workers(config.data.num_workers, world.local_size, world.device.type == "cuda")
        self.dtype = autocast_dtype(config.run.precision, world.device)
        self.steps = {round(task.plan.num_steps * tenth / 10) for tenth in range(1, 11)}
        self.last: Collected | None = None  # of the finished model

    def due(self, step: int) -> bool:
        interval = self.task.config.eval_interval
        is_time = step % interval == 0 if interval else step in self.steps
        return step > 0 and (is_time or step == self.task.plan.num_steps)

    def __call__(self, step: int, writer: SummaryWriter | None) -> dict[str, float]:
        seen = self.collect(None)
        if step == self.task.plan.num_steps:
            self.last = seen
        loss = F.cross_entropy(seen.outputs, seen.labels)
        return {"val/top1": float(topk_correct(seen.outputs, seen.labels).double().mean()), "val/loss": float(loss)}

    def collect(self, title: str | None) -> Collected:
        """Returns the logits of the whole validation set."""
        model, world = self.task.judged, self.task.world
        world.broadcast(model.buffers())  # each process has its own statistics of a BatchNorm
        was_training = model.training
        model.eval()
        images, data = range(len(self.source)), self.task.config.data
        seen = collect(self._logits, self.source, images, data, world, self.num_workers, title)
        model.train(was_training)
        return seen

    def _logits(self, images: Tensor) -> Tensor:
        config = self.task.config
        with torch.autocast(self.task.world.device.type, self.dtype, enabled=self.dtype is not None):
            return self.task.judged(preprocess(images, config.data.image_size, config))


def open_labelled(config: ClassifyConfig) -> TaskData:
    """Opens both splits and checks that they have the same classes.

    Raises:
        DataError: if labels are missing, the classes differ, or a class has no training image.
    """
    assert config.data.val is not None  # the config's own check
    train_source, val_source = (
        open_images(config.data, spec, config.model.in_chans, need_labels=True)
        for spec in (config.data.train, config.data.val)
    )
    labels = [set(np.unique(np.asarray(source.labels)).tolist()) for source in (train_source, val_source)]
    check_same_classes(train_source, val_source)
    names = [list(source.class_names or ()) for source in (train_source, val_source)]
    class_names = names[0] or names[1] or [str(i) for i in range(max(labels[0] | labels[1]) + 1)]
    empty = [class_names[i] for i in range(len(class_names)) if i not in labels[0]]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(class_names)} classes have no image in data.train: {some_of(empty)}; "
            "add images or remove the classes from both splits"
        )
    if unknown := sorted(label for label in labels[1] if label >= len(class_names)):
        raise DataError(f"data.val has labels that data.train does not have: {unknown[:5]}")
    return TaskData(train_source, val_source, tuple(class_names))


def preprocess(images: Tensor, bandwidth: int, config: ClassifyConfig) -> Tensor:
    """Crops to the low frequencies and normalizes: uint8 [n, C, S, S] -> float32 [n, C, B, B]."""
    return crop_and_normalize(images, bandwidth, config.data.mean, config.data.std, config.curriculum.centered)
