"""What fine-tuning and the linear probe share: labelled data, the evaluation, the classifier file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_et.config.filters import FilterConfig
from mae_et.config.schema import ClassifyConfig
from mae_et.config.supervised import SupervisedConfig, SupervisedDataConfig
from mae_et.curriculum.cost import ModelCost, vit_cost
from mae_et.curriculum.plan import Plan
from mae_et.data.buffers import Batch
from mae_et.data.sources.class_list import class_list, number_classes
from mae_et.data.sources.source import ImageSource
from mae_et.data.sources.spec import check_same_classes, open_images, some_of
from mae_et.data.sources.subset import subset_of
from mae_et.data.stream import choose_num_workers
from mae_et.engine.distributed import World
from mae_et.engine.loggers import Loggers
from mae_et.engine.parallel import build_on_device
from mae_et.engine.precision import autocast_dtype
from mae_et.engine.progress import Progress
from mae_et.errors import DataError
from mae_et.evaluation.classification import topk_correct, write_verdict
from mae_et.evaluation.collect import Collected, collect
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.sizes import Size
from mae_et.runs.provenance import describe_weights
from mae_et.runs.records import ClassifierSummary
from mae_et.storage.backbone import write_safetensors
from mae_et.tasks.classifier import build_classifier, build_optimizer, classifier_metadata, open_backbone
from mae_et.tasks.filtering import filtered
from mae_et.tasks.label_subset import draw_subset
from mae_et.tasks.run import TaskData, TrainingTask

log = logging.getLogger(__name__)


class LabelledTask(TrainingTask):
    """The part that all trainings on labelled images share: a subclass sets the attributes in its constructor.

    Attributes:
        config: of the run.
        plan: of the run.
        class_names: in the order of the labels.
        evaluation: the accuracy on data.val; None without data.val.
    """

    config: ClassifyConfig | SupervisedConfig
    plan: Plan
    class_names: list[str]
    evaluation: EvalHook | None
    resumes_other_weights = False
    sees_batch_split = True  # mixup, drop path and BatchNorm see the micro batch

    @classmethod
    def open_data(cls, config: ClassifyConfig | SupervisedConfig) -> TaskData:
        return open_labelled(config)

    @property
    def judged(self) -> nn.Module:
        """The network that is evaluated and written: the average of the weights where there is one."""
        return self.model if self.ema is None else self.ema.module

    def judged_at(self, size: Size) -> nn.Module:
        """Returns the network to evaluate on images of a size, px."""
        return self.judged

    def eval_sizes(self) -> dict[str, Size]:
        """Returns the sizes to evaluate at, px, by the beginning of the metrics' names."""
        return {"val/": self.config.data.image_size}

    def val_filters(self) -> Sequence[FilterConfig]:
        """Returns the filters under which the accuracy is measured too."""
        return ()

    def preprocess(self, images: Tensor, size: Size) -> Tensor:
        return preprocess(images, size, self.config)

    def verdict(self, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """Evaluates the finished model, on all processes, and writes per_class.csv and confusion.*, on the main one.

        Args:
            metrics: lines of metrics.jsonl.
        Returns:
            The accuracies for summary.json; empty without data.val, and on other processes than the main one.
        """
        if self.evaluation is None:
            return {}
        seen = self.evaluation.last or self.evaluation.collect("evaluation")  # a finished run that was resumed has none
        if not self.world.is_main:
            return {}
        return {
            **write_verdict(seen.outputs, seen.labels, self.class_names, self.work_dir),
            "top1_history": [(line["step"], line["val/top1"]) for line in metrics if "val/top1" in line],
            "unreadable_val_images": len(seen.bad_images),
        }


class ClassificationTask(LabelledTask):
    """Trains a classifier on the features of a backbone.

    Args:
        config: of the run.
        data: of the run, with labels.
        plan: of the run.
        world: this process among the others.
        work_dir: gets per_class.csv, confusion.csv, confusion.png and classifier.safetensors.
    """

    kind = "classify"
    summary_type = ClassifierSummary
    config: ClassifyConfig

    @classmethod
    def cost(cls, config: ClassifyConfig) -> ModelCost:
        return vit_cost(config.model)

    def __init__(self, config: ClassifyConfig, data: TaskData, plan: Plan, world: World, work_dir: Path) -> None:
        self.config, self.plan, self.world, self.work_dir = config, plan, world, work_dir
        self.class_names = list(data.class_names)
        backbone = open_backbone(config)
        num_classes = len(self.class_names)
        self.model = build_on_device(lambda: build_classifier(config, num_classes, backbone), config.run, world)
        self.initial_weights = describe_weights(config.backbone)
        encoder: Any = getattr(self.model, "encoder", self.model)  # of a probe
        self.metadata = classifier_metadata(config, self.class_names, encoder.blocks[0].norm1.eps)
        self.optimizer = build_optimizer(config, self.model)
        assert data.val is not None  # the config needs it
        self.evaluation = EvalHook(self, data.val)
        self.hooks = [self.evaluation]

    def loss(self, model: nn.Module, images: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return F.cross_entropy(model(images).float(), batch.labels), {}

    def finish(self, progress: Progress, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        verdict = self.verdict(metrics)
        if self.world.is_main:
            write_safetensors(self.judged.state_dict(), self.work_dir / "classifier.safetensors", self.metadata)
        return {"kind": self.config.protocol, **verdict}


class EvalHook:
    """Accuracy on data.val at the end of each tenth of the run, or every `eval_interval` steps."""

    def __init__(self, task: LabelledTask, source: ImageSource) -> None:
        self.task, self.source = task, source
        config, world = task.config, task.world
        self.num_workers = choose_num_workers(config.data.num_workers, world.local_size, world.device.type == "cuda")
        self.dtype = autocast_dtype(config.run.precision, world.device)
        self.last: Collected | None = None  # of the finished model

    def due(self, step: int) -> bool:
        interval = self.task.config.eval_interval
        num_steps = self.task.plan.num_steps
        ends_tenth = any(step == round(num_steps * tenth / 10) for tenth in range(1, 11))
        is_time = step % interval == 0 if interval else ends_tenth
        return step > 0 and (is_time or step == num_steps)

    def __call__(self, step: int, writer: Loggers | None) -> dict[str, float]:
        values = {}
        full_size = self.task.config.data.image_size
        for prefix, size in self.task.eval_sizes().items():
            filters = self.task.val_filters() if size == full_size else ()
            views = self._collect_views(None, size, filters)
            if step == self.task.plan.num_steps and size == full_size:
                self.last = views[0]
            values[f"{prefix}loss"] = float(F.cross_entropy(views[0].outputs, views[0].labels))
            names = [f"{prefix}top1", *(f"{prefix}top1/{row.name}" for row in filters)]
            for name, seen in zip(names, views, strict=True):
                values[name] = float(topk_correct(seen.outputs, seen.labels).double().mean())
        return values

    def collect(self, title: str | None) -> Collected:
        """Returns the logits of the whole validation set at full size.

        Args:
            title: of the progress bar; None: no bar.
        """
        return self._collect_views(title, self.task.config.data.image_size, ())[0]

    def _collect_views(self, title: str | None, size: Size, filters: Sequence[FilterConfig]) -> list[Collected]:
        """Returns the logits for images cropped to a size, px: as they are, and then under each filter."""
        task, config = self.task, self.task.config
        task.world.broadcast(task.judged.buffers())  # each process has its own statistics of a BatchNorm
        model = task.judged_at(size)
        was_training = model.training
        model.eval()

        def logits(images: Tensor) -> Tensor:
            plain = preprocess(images, size, config)
            views = [plain, *(filtered(plain, row, config.data.image_size) for row in filters)]
            with torch.autocast(task.world.device.type, self.dtype, enabled=self.dtype is not None):
                return torch.stack([cast(Tensor, model(view)) for view in views], dim=1)

        images = range(len(self.source))
        seen = collect(logits, self.source, images, config.data, task.world, self.num_workers, title)
        model.train(was_training)
        return [replace(seen, outputs=outputs) for outputs in seen.outputs.unbind(1)]


def open_labelled(config: ClassifyConfig | SupervisedConfig) -> TaskData:
    """Opens both splits, or the training images alone if there is no data.val, and checks that they have the same classes.

    Raises:
        DataError: if labels are missing, the classes differ or are not as many as data.num_classes, or a class has no
            training image. With data.classes, classes may lack images, but must be in the list.
    """
    data = config.data
    classes, num_classes = (data.classes, data.num_classes) if isinstance(data, SupervisedDataConfig) else (None, None)
    listed = class_list(classes) if classes else []

    def open_split(name: str, spec: str) -> ImageSource:
        source = open_images(data, spec, config.model.in_chans, need_labels=True)
        if classes:
            number_classes(source, listed, classes, name)
        return source

    train_source = open_split("data.train", data.train)
    labels, names = _classes(train_source), list(train_source.class_names or ())
    val_source, val_labels = None, set[int]()
    if data.val is not None:
        val_source = open_split("data.val", data.val)
        val_labels = _classes(val_source)
        check_same_classes(train_source, val_source)
        names = names or list(val_source.class_names or ())
    class_names = names or [str(i) for i in range(max(labels | val_labels) + 1)]
    if num_classes is not None and len(class_names) != num_classes:
        more = len(class_names) - num_classes
        raise DataError(
            f"the data has {len(class_names)} classes, {abs(more)} {'more' if more > 0 else 'fewer'} than data.num_classes = "
            f"{num_classes}: correct the folders or data.num_classes, or name the list by data.classes if classes may lack images"
        )
    empty = [] if listed else [class_names[i] for i in range(len(class_names)) if i not in labels]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(class_names)} classes have no image in data.train: {some_of(empty)}; "
            "add images or remove the classes from both splits (a supervised training may keep them by data.classes)"
        )
    if unknown := sorted(label for label in val_labels if label >= len(class_names)):
        raise DataError(f"data.val has labels that data.train does not have: {unknown[:5]}; correct them")
    if isinstance(config, ClassifyConfig) and config.is_trained and not config.labels.are_all:
        drawn = draw_subset(np.asarray(train_source.labels), class_names, config.labels, config.run.seed)
        log.info(
            "labels: %d of %d images of data.train, drawn with seed %d", len(drawn), len(train_source), config.run.seed
        )
        train_source = subset_of(train_source, drawn)
    return TaskData(train_source, val_source, tuple(class_names))


def _classes(source: ImageSource) -> set[int]:
    """Returns the class indices that occur."""
    return set(np.unique(np.asarray(source.labels)).tolist())


def preprocess(images: Tensor, size: Size, config: ClassifyConfig | SupervisedConfig) -> Tensor:
    """Crops to the low frequencies and normalizes: uint8 [n, C, H, W] -> float32 [n, C, *size]."""
    return crop_and_normalize(images, size, config.data.mean, config.data.std, config.curriculum.centered)
