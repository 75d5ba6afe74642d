"""A verdict on a backbone: fine-tuning, linear probe and kNN on labelled images.

Fine-tuning and the linear probe run on the loop of train.py with another objective; kNN needs no training.
"""

from __future__ import annotations

import csv
import json
import logging
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from mae_et.checkpoint import atomic_path
from mae_et.config import BackboneConfig, ClassifyConfig
from mae_et.curriculum import Plan, make_plan
from mae_et.data.loader import Batch, default_num_workers, make_loader
from mae_et.data.sources import ImageSource, open_source
from mae_et.data.transforms import make_train_transform, sample_rng
from mae_et.distributed import World, join_world
from mae_et.errors import CheckpointError, ConfigError, DataError
from mae_et.evaluate import Collected, collect
from mae_et.export import load_encoder, read_backbone
from mae_et.lowfreq import crop_and_normalize
from mae_et.metrics import confusion_matrix, knn_predict, per_class_accuracy, read_jsonl, topk_correct, wilson_interval
from mae_et.models.vit import random_vit
from mae_et.optim import param_groups
from mae_et.run_folder import describe_model, make_work_dir, open_run, summarize, write_json
from mae_et.train import autocast_dtype, train
from mae_et.visualize import draw_confusion

log = logging.getLogger(__name__)


def classify(
    config: ClassifyConfig, work_dir: str | Path, resume: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Judges a backbone by the config's protocol.

    Args:
        config: what to do.
        work_dir: gets config.py, environment.json, summary.json, per_class.csv, confusion.csv, confusion.png; of a
            training also plan.json, metrics.jsonl, tensorboard/, checkpoints/ and classifier.safetensors.
        resume: go on from the newest checkpoint there.
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
    for note in plan.notes:
        log.info("note: %s", note)
    identity, state = open_run(config, "classify", work_dir, resume, train_source, plan, world)

    # ---------------------------------------------------------------- model, optimizer, objective
    torch.manual_seed(config.run.seed)
    model = build_classifier(config, len(class_names)).to(world.device)
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
            train_source, transform, plan, config.run.seed, first_step, world.rank, num_workers, pin_memory=on_gpu
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
    seen = evaluation.collect("evaluation")
    metrics = read_jsonl(work_dir / "metrics.jsonl")
    summary = {
        "protocol": config.protocol,
        **write_verdict(seen.outputs, seen.labels, class_names, work_dir),
        "top1_history": [(line["step"], line["val/top1"]) for line in metrics if "val/top1" in line],
        "backbone": config.backbone,
        "backbone_metadata": _metadata(config.backbone),
        "unreadable_val_images": len(seen.bad_images),
        **summarize(plan, progress, metrics, world),
    }
    with atomic_path(work_dir / "classifier.safetensors") as temporary:
        tensors = {key: value.cpu().contiguous() for key, value in judged.state_dict().items()}
        save_file(tensors, temporary, {"format": "pt", "class_names": json.dumps(class_names)})
    write_json(work_dir / "summary.json", summary)
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
    make_work_dir(config, work_dir, world)
    torch.manual_seed(config.run.seed)
    encoder = build_encoder(config).to(world.device).eval()
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
    predictions = knn_predict(
        bank.outputs, bank.labels, queries.outputs, config.knn.ks, config.knn.temperature, len(class_names)
    )
    top1 = {k: float((predicted == queries.labels).float().mean()) for k, predicted in predictions.items()}
    k = 20 if 20 in top1 else config.knn.ks[0]
    votes = F.one_hot(predictions[k], len(class_names)).float()
    summary = {
        "protocol": "knn",
        **write_verdict(votes, queries.labels, class_names, work_dir, top5=False),
        "k": k,
        "top1_by_k": top1,
        "temperature": config.knn.temperature,
        "backbone": config.backbone,
        "backbone_metadata": _metadata(config.backbone),
        "num_train": len(bank.labels),
        "unreadable_train_images": len(bank.bad_images),
        "unreadable_val_images": len(queries.bad_images),
        "feature_seconds": extracted - start,
        "knn_seconds": time.perf_counter() - extracted,
        "status": "finished",
    }
    write_json(work_dir / "summary.json", summary)
    return summary


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
    names = [list(source.class_names) if source.class_names else None for source in (train_source, val_source)]
    if names[0] and names[1] and names[0] != names[1]:
        only_train, only_val = (sorted(set(a) - set(b))[:5] for a, b in ((names[0], names[1]), (names[1], names[0])))
        raise DataError(
            f"data.train and data.val have different classes: only in train: {', '.join(only_train) or 'none'}; "
            f"only in val: {', '.join(only_val) or 'none'}. Labels are numbered by the sorted names, so both need the same"
        )
    class_names = names[0] or names[1] or [str(i) for i in range(max(labels[0] | labels[1]) + 1)]
    empty = [class_names[i] for i in range(len(class_names)) if i not in labels[0]]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(class_names)} classes have no image in data.train: {', '.join(empty[:5])}; "
            "add images or remove the classes from both splits"
        )
    if unknown := sorted(label for label in labels[1] if label >= len(class_names)):
        raise DataError(f"data.val has labels that data.train has not: {unknown[:5]}")
    return train_source, val_source, class_names


def preprocess(images: Tensor, bandwidth: int, config: ClassifyConfig) -> Tensor:
    """uint8 [n, C, S, S] -> normalised low-frequency crop [n, C, B, B]."""
    return crop_and_normalize(images, bandwidth, config.data.mean, config.data.std, config.curriculum.centered)


# -------------------------------------------------------------------- models


def build_classifier(config: ClassifyConfig, num_classes: int) -> nn.Module:
    """Builds what is trained: the ViT with a head, or a frozen ViT under a linear probe."""
    if config.protocol == "linear_probe":
        return LinearProbe(build_encoder(config), num_classes, config.model.pool)
    model = build_encoder(
        config, num_classes=num_classes, drop_path_rate=config.model.drop_path_rate, global_pool=config.model.pool
    )
    nn.init.trunc_normal_(model.head.weight, std=config.model.head_init_std)  # type: ignore[arg-type]
    return model


def build_encoder(config: ClassifyConfig, **kwargs: Any) -> VisionTransformer:
    """Builds the config's ViT with the backbone file's weights, or random ones.

    Raises:
        CheckpointError: if the file is of another architecture, naming the differences.
    """
    dims, model = config.model.dims, config.model
    if config.backbone is None:
        return random_vit(
            config.data.image_size, patch_size=dims.patch_size, in_chans=model.in_chans, embed_dim=dims.embed_dim,
            depth=dims.depth, num_heads=dims.num_heads, mlp_ratio=dims.mlp_ratio, **kwargs,
        )  # fmt: skip
    state, metadata = read_backbone(config.backbone)
    check_architecture(state, metadata, config.model, config.backbone)
    return load_encoder(
        config.backbone, config.data.image_size, patch_size=dims.patch_size, in_chans=model.in_chans,
        num_heads=dims.num_heads, **kwargs,
    )  # fmt: skip


def check_architecture(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], model: BackboneConfig, path: str
) -> None:
    """Compares a backbone file with the config.

    Raises:
        CheckpointError: naming each difference and the options that mend it.
    """
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4:
        return  # load_encoder says what the file is instead
    dims = model.dims
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    found = {"embed_dim": kernel.shape[0], "depth": depth, "in_chans": kernel.shape[1], "patch_size": kernel.shape[2]}
    if "num_heads" in metadata:
        found["num_heads"] = int(metadata["num_heads"])
    wanted = {**vars(dims), "in_chans": model.in_chans}
    different = {name: value for name, value in found.items() if value != wanted[name]}
    if different:
        raise CheckpointError(
            f"{path} is another network than the config's: "
            + ", ".join(f"{name} = {value} (config: {wanted[name]})" for name, value in different.items())
            + ". Use --cfg-options "
            + " ".join(f"model.{name}={value}" for name, value in different.items())
        )


def pooled(encoder: VisionTransformer, images: Tensor, pool: str) -> Tensor:
    """Returns the normalised cls token or the mean of the normalised patch tokens, [n, D]."""
    tokens = encoder.forward_features(images)
    return tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(dim=1)


class LinearProbe(nn.Module):
    """A frozen encoder, a BatchNorm without parameters, and a linear layer.

    Args:
        encoder: gives [n, 1 + L, D].
        num_classes: of the head.
        pool: "token" or "avg".
    Source: MAE (arXiv 2111.06377), linear probing.
    """

    def __init__(self, encoder: VisionTransformer, num_classes: int, pool: str) -> None:
        super().__init__()
        self.encoder, self.pool = encoder.requires_grad_(False), pool
        self.norm = nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6)
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> LinearProbe:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = pooled(self.encoder, images, self.pool)
        return self.head(self.norm(features))


def build_optimizer(config: ClassifyConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Builds AdamW with layer decay, or LARS; the plan sets the learning rate."""
    options = config.optimizer
    groups = param_groups(
        model, options.weight_decay, layer_decay=options.layer_decay, depth=config.model.dims.depth, no_decay=NO_DECAY
    )
    if options.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=options.betas, eps=options.eps, fused=True)
    for group in groups:  # timm's Lars takes no names; biases and norms keep their plain gradient
        group["params"] = [parameter for _, parameter in group["params"]]
        group["always_adapt"] = group["params"][0].ndim > 1
    # timm checks that lr is positive; the plan sets it before the first step.
    return Lars(groups, lr=1.0, momentum=options.momentum, trust_coeff=options.trust_coefficient, eps=0.0)


NO_DECAY = ("pos_embed", "cls_token")  # not decayed in fine-tuning, as in MAE's released recipe


# -------------------------------------------------------------------- objective and evaluation


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
        with sample_rng(self.seed * 0x9E3779B1 + int(batch.first_place)):
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

    def __call__(self, step: int, writer: SummaryWriter) -> dict[str, float]:
        interval = self.config.eval_interval
        due = step % interval == 0 if interval else step in self.steps
        if step == 0 or not (due or step == self.plan.num_steps):
            return {}
        seen = self.collect(None)
        loss = F.cross_entropy(seen.outputs, seen.labels)
        return {"val/top1": float(topk_correct(seen.outputs, seen.labels).float().mean()), "val/loss": float(loss)}

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


def write_verdict(
    logits: Tensor, labels: Tensor, class_names: list[str], work_dir: Path, top5: bool = True
) -> dict[str, Any]:
    """Writes per_class.csv, confusion.csv and confusion.png; returns the accuracies.

    Args:
        logits: [M, classes].
        labels: [M].
        class_names: in the order of the labels.
        work_dir: where to write.
        top5: whether the logits rank more than the first class.
    """
    logits, labels = logits.cpu(), labels.cpu()
    num_classes = len(class_names)
    correct = int(topk_correct(logits, labels).sum())
    confusion = confusion_matrix(logits.argmax(dim=1), labels, num_classes)
    with open(work_dir / "per_class.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "name", "num_images", "accuracy"])
        accuracies = per_class_accuracy(confusion).tolist()
        for i, (name, accuracy) in enumerate(zip(class_names, accuracies, strict=True)):
            rows.writerow([i, name, int(confusion[i].sum()), "" if accuracy != accuracy else f"{accuracy:.4f}"])
    with open(work_dir / "confusion.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["true \\ predicted", *class_names])
        rows.writerows([name, *counts] for name, counts in zip(class_names, confusion.tolist(), strict=True))
    draw_confusion(confusion, class_names, work_dir / "confusion.png")
    return {
        "top1": correct / len(labels),
        "top1_interval_95": wilson_interval(correct, len(labels)),
        "top5": float(topk_correct(logits, labels, 5).float().mean()) if top5 and num_classes > 5 else None,
        "num_val": len(labels),
        "num_classes": num_classes,
    }


def _metadata(backbone: str | None) -> dict[str, str] | None:
    return None if backbone is None else read_backbone(backbone)[1]
