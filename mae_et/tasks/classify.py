"""A verdict on a backbone: fine-tuning, linear probe and kNN on labelled images.

Fine-tuning and the linear probe run on the loop of train.py with another objective; kNN needs no training.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from mae_et.config.schema import ClassifyConfig
from mae_et.curriculum.plan import Plan, make_plan
from mae_et.data.sources.source import ImageSource
from mae_et.data.sources.spec import check_same_classes, open_source, some_of
from mae_et.data.stream import Batch, default_num_workers, make_loader
from mae_et.data.transforms import make_train_transform, sample_rng
from mae_et.engine.distributed import World, join_world
from mae_et.engine.trainer import autocast_dtype, device_peak_tflops, train
from mae_et.errors import ConfigError, DataError, UserError
from mae_et.evaluation.collect import Collected, collect, write_verdict
from mae_et.evaluation.metrics import knn_predict, topk_correct
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.linear_probe import pooled
from mae_et.runs.folder import describe_model, make_work_dir, open_run
from mae_et.runs.provenance import describe_weights, peak_memory_mb
from mae_et.runs.records import ClassifierSummary, KnnSummary, write_record
from mae_et.runs.summary import summarize, write_stage_scalars
from mae_et.storage.backbone import encoder_digest
from mae_et.storage.checkpoint import atomic_path, list_checkpoints
from mae_et.storage.metrics_file import read_jsonl
from mae_et.tasks.classifier import build_classifier, build_encoder, build_optimizer, classifier_metadata, open_backbone

log = logging.getLogger(__name__)


def classify(
    config: ClassifyConfig, work_dir: str | Path, resume: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Judges a backbone by the config's protocol.

    Args:
        config: what to do.
        work_dir: gets config.py, environment.json, summary.json, per_class.csv, confusion.csv, confusion.png; of a
            training also plan.json, metrics.jsonl, tensorboard/, checkpoints/ and classifier.safetensors.
        resume: go on from the newest checkpoint there; kNN, which takes minutes, has none and starts anew.
        device: "cpu" or "cuda"; None: CUDA where there is one.
    Returns:
        The summary, as in summary.json: top1, top5 (from six classes on), their interval, and what it cost.
    Raises:
        UserError: whatever the user can mend; see errors.py.
    """
    with join_world(device) as world:
        if not world.is_main:
            logging.getLogger("mae_et").setLevel(logging.WARNING)
        train_source, val_source, class_names = open_labelled(config)
        if config.data.num_images not in (None, len(train_source)):
            log.warning(
                "data.num_images = %d, but data.train holds %d images", config.data.num_images, len(train_source)
            )
        if config.protocol == "knn":
            return _knn(config, Path(work_dir), train_source, val_source, class_names, world)
        return _train(config, Path(work_dir), resume, train_source, val_source, class_names, world)


def _train(
    config: ClassifyConfig,
    work_dir: Path,
    resume: bool,
    train_source: ImageSource,
    val_source: ImageSource,
    class_names: list[str],
    world: World,
) -> dict[str, Any]:
    # ---------------------------------------------------------------- plan and run folder
    plan = make_plan(config, len(train_source), world.size)
    _check_batches(config, plan)
    backbone, initial_weights = open_backbone(config), describe_weights(config.backbone)
    torch.manual_seed(config.run.seed)
    model = build_classifier(config, len(class_names), backbone)
    weights = None if backbone is None else encoder_digest(backbone.state)["encoder_sha256"]
    backbone = None  # its tensors are copied
    own_metadata = classifier_metadata(config, class_names)
    identity, state = open_run(config, "classify", work_dir, resume, train_source, plan, world, own_metadata, weights)

    # ---------------------------------------------------------------- optimizer, objective
    model = model.to(world.device)
    optimizer = build_optimizer(config, model)
    ema = None
    if config.regularization.ema_decay is not None and config.protocol == "finetune":
        ema = ModelEmaV3(model, decay=config.regularization.ema_decay)
    if config.run.compile:
        model.compile(dynamic=False)
    objective = ClassifyObjective(config, len(class_names), world.device)

    # ---------------------------------------------------------------- loader and evaluation
    on_gpu = world.device.type == "cuda"
    num_workers = config.data.num_workers
    if num_workers is None:
        num_workers = default_num_workers(world.local_size, on_gpu)
    transform = make_train_transform(config.data)

    def loader(first_step: int) -> Iterable[Batch]:
        return make_loader(
            train_source,
            transform,
            plan,
            config.run.seed,
            first_step,
            world.rank,
            num_workers,
            on_gpu,
            loading=config.data.loading,
        )

    judged = model if ema is None else ema.module
    evaluation = EvalHook(judged, val_source, plan, config, world, num_workers)

    # ---------------------------------------------------------------- train, judge, sum up
    log.info(
        "%s: %s of %s, %d images in %d classes, %d steps, on %s",
        work_dir, config.protocol, describe_model(model), len(train_source), len(class_names), plan.num_steps,
        world.device,
    )  # fmt: skip
    progress = train(
        plan, model, objective, optimizer, loader, partial(preprocess, config=config), config.run, world, work_dir,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        hooks=[evaluation] if world.is_main else [],
        identity=identity,
        resume_from=state,
        max_bad_images=int(config.data.max_bad_fraction * len(train_source)),
        image_name=train_source.name,
        ema=ema,
    )  # fmt: skip
    if not world.is_main:
        return {}
    seen = evaluation.last or evaluation.collect("evaluation")  # a finished run that was resumed has no last one
    metrics = read_jsonl(work_dir / "metrics.jsonl")
    assert config.protocol != "knn"
    record = ClassifierSummary(
        kind=config.protocol,
        **write_verdict(seen.outputs, seen.labels, class_names, work_dir),
        top1_history=[(line["step"], line["val/top1"]) for line in metrics if "val/top1" in line],
        initial_weights=initial_weights,
        unreadable_val_images=len(seen.bad_images),
        **summarize(plan, progress, metrics, world, device_peak_tflops(config.run.precision, world.device)),
    )
    with atomic_path(work_dir / "classifier.safetensors") as temporary:
        tensors = {key: value.cpu().contiguous() for key, value in judged.state_dict().items()}
        save_file(tensors, temporary, {"format": "pt", **own_metadata})
    write_record(work_dir / "summary.json", record)
    summary = record.model_dump(mode="json")
    write_stage_scalars(summary, plan, work_dir)
    return summary


def _knn(
    config: ClassifyConfig,
    work_dir: Path,
    train_source: ImageSource,
    val_source: ImageSource,
    class_names: list[str],
    world: World,
) -> dict[str, Any]:
    if max(config.knn.ks) > len(train_source):
        raise ConfigError(
            [f"knn.ks: k = {max(config.knn.ks)} exceeds the {len(train_source)} labelled images of data.train"],
            "config",
        )
    if world.size > 1:
        raise ConfigError([f"protocol 'knn' runs in one process, not in {world.size}: start it without torchrun"])
    if list_checkpoints(work_dir / "checkpoints"):
        raise UserError(f"{work_dir} holds a training run: choose another --work-dir for the kNN accuracy")
    backbone, initial_weights = open_backbone(config), describe_weights(config.backbone)
    torch.manual_seed(config.run.seed)
    encoder = build_encoder(config, backbone).to(world.device).eval()
    make_work_dir(config, work_dir, world)
    dtype = autocast_dtype(config.run.precision, world.device)
    num_workers = config.data.num_workers
    if num_workers is None:
        num_workers = default_num_workers(world.local_size, world.device.type == "cuda")

    def features(images: Tensor) -> Tensor:
        with torch.autocast(world.device.type, dtype, enabled=dtype is not None):
            return pooled(encoder, preprocess(images, config.data.image_size, config), config.model.pool)

    start = time.perf_counter()
    bank, queries = (
        collect(features, source, range(len(source)), config.data, world.device, num_workers, title=title)
        for source, title in ((train_source, "training features"), (val_source, "validation features"))
    )
    extracted = time.perf_counter()
    if max(config.knn.ks) > len(bank.labels):
        raise DataError(
            f"only {len(bank.labels)} images of data.train can be read, fewer than the {max(config.knn.ks)} neighbours of "
            "knn.ks: lower k or mend the images"
        )
    predictions = knn_predict(
        bank.outputs, bank.labels, queries.outputs, config.knn.ks, config.knn.temperature, len(class_names)
    )
    top1 = {k: float((predicted == queries.labels).double().mean()) for k, predicted in predictions.items()}
    k = 20 if 20 in top1 else config.knn.ks[0]
    votes = F.one_hot(predictions[k], len(class_names)).float()
    done = time.perf_counter()
    record = KnnSummary(
        **write_verdict(votes, queries.labels, class_names, work_dir, top5=False),
        k=k,
        top1_by_k=top1,
        temperature=config.knn.temperature,
        initial_weights=initial_weights,
        num_train=len(bank.labels),
        unreadable_train_images=len(bank.bad_images),
        unreadable_val_images=len(queries.bad_images),
        seconds=done - start,
        feature_seconds=extracted - start,
        knn_seconds=done - extracted,
        peak_memory_mb=peak_memory_mb(),
    )
    write_record(work_dir / "summary.json", record)
    return record.model_dump(mode="json")


# -------------------------------------------------------------------- data


def open_labelled(config: ClassifyConfig) -> tuple[ImageSource, ImageSource, list[str]]:
    """Opens both splits and makes sure that they speak of the same classes.

    Raises:
        DataError: if labels are missing, the classes differ, or a class has no training image.
    """
    assert config.data.val is not None  # the config's own check
    train_source, val_source = (
        open_source(spec, config.model.in_chans, need_labels=True) for spec in (config.data.train, config.data.val)
    )
    labels = [set(source.labels or ()) for source in (train_source, val_source)]
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
        raise DataError(f"data.val has labels that data.train has not: {unknown[:5]}")
    return train_source, val_source, class_names


def preprocess(images: Tensor, bandwidth: int, config: ClassifyConfig) -> Tensor:
    """uint8 [n, C, S, S] -> normalised low-frequency crop [n, C, B, B]."""
    return crop_and_normalize(images, bandwidth, config.data.mean, config.data.std, config.curriculum.centered)


# -------------------------------------------------------------------- objective and evaluation

_BATCH_STREAM = 1 << 63  # so that a batch's draws are not those of its first image's augmentation


def _check_batches(config: ClassifyConfig, plan: Plan) -> None:
    """Raises a ConfigError for batches that mixup, which pairs the images, or the probe's BatchNorm cannot take."""
    if config.protocol == "linear_probe" and any(stage.micro_batch_size == 1 for stage in plan.stages):
        raise ConfigError(
            ["the linear probe's BatchNorm needs 2 images at once or more: raise the batch or batch.micro_batch_size"]
        )
    odd = [stage.micro_batch_size for stage in plan.stages if stage.micro_batch_size % 2]
    mixes = config.protocol == "finetune" and (config.regularization.mixup or config.regularization.cutmix)
    if mixes and odd:
        raise ConfigError(
            [
                f"mixup and cutmix need even batches, but batch.global_batch_size = {config.batch.global_batch_size} over "
                f"{plan.world_size} processes and {plan.stages[0].accum_steps} accumulation steps gives {odd[0]} images: "
                "change batch.global_batch_size or batch.micro_batch_size"
            ]
        )


class ClassifyObjective:
    """Cross-entropy; in fine-tuning with random erasing, mixup and cutmix, drawn from the batch's place in the stream.

    Args:
        config: its regularization.
        num_classes: of the head.
        device: where the images are.
    """

    def __init__(self, config: ClassifyConfig, num_classes: int, device: torch.device) -> None:
        options, self.seed = config.regularization, config.run.seed
        self.mixup = self.erase = None
        self.label_smoothing = 0.0
        if config.protocol == "finetune":
            self.label_smoothing = options.label_smoothing
            if options.mixup or options.cutmix:
                self.mixup = Mixup(
                    options.mixup, options.cutmix, label_smoothing=options.label_smoothing, num_classes=num_classes
                )
            if options.erasing:
                self.erase = RandomErasing(options.erasing, mode="pixel", device=str(device))

    def __call__(self, model: nn.Module, images: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        targets = batch.labels
        with sample_rng(self.seed * 0x9E3779B1 + int(batch.first_place) + _BATCH_STREAM):
            if self.erase is not None:
                images = self.erase(images)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
        logits = model(images)
        smoothing = 0.0 if self.mixup is not None else self.label_smoothing  # the mixed targets are smooth already
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing), {}


class EvalHook:
    """Accuracy on data.val at the end of each tenth of the run, or every `eval_interval` steps."""

    def __init__(
        self, model: nn.Module, source: ImageSource, plan: Plan, config: ClassifyConfig, world: World, num_workers: int
    ) -> None:
        self.model, self.source, self.plan, self.config, self.world = model, source, plan, config, world
        self.num_workers = num_workers
        self.dtype = autocast_dtype(config.run.precision, world.device)
        self.steps = {round(plan.num_steps * i / 10) for i in range(1, 11)}
        self.last: Collected | None = None  # of the finished model

    def due(self, step: int) -> bool:
        interval = self.config.eval_interval
        is_time = step % interval == 0 if interval else step in self.steps
        return step > 0 and (is_time or step == self.plan.num_steps)

    def __call__(self, step: int, writer: SummaryWriter) -> dict[str, float]:
        seen = self.collect(None)
        if step == self.plan.num_steps:
            self.last = seen
        loss = F.cross_entropy(seen.outputs, seen.labels)
        return {"val/top1": float(topk_correct(seen.outputs, seen.labels).double().mean()), "val/loss": float(loss)}

    def collect(self, title: str | None) -> Collected:
        """Returns the logits of the whole validation set."""
        was_training = self.model.training
        self.model.eval()
        data, device = self.config.data, self.world.device
        seen = collect(self._logits, self.source, range(len(self.source)), data, device, self.num_workers, title=title)
        self.model.train(was_training)
        return seen

    def _logits(self, images: Tensor) -> Tensor:
        with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype is not None):
            return self.model(preprocess(images, self.config.data.image_size, self.config))
