"""Judges the patch features of a frozen backbone by masks: a linear and a kNN probe.

Shapes: n images of a batch, H, W px of a mask, S x T px of the network's input, L = h w patches of an image, p patch size,
D width, K classes, M training patches.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from mae_et.config.dense_probe import DenseProbeConfig
from mae_et.data.dense import IGNORE, DenseSplit, Pair, Sample, check_sizes, dense_loader, open_split
from mae_et.data.stream import choose_num_workers, reading
from mae_et.engine.distributed import World, join_world
from mae_et.engine.precision import autocast_dtype, choose_precision
from mae_et.errors import ConfigError, DataError, UserError
from mae_et.evaluation.heads import edge_notes, score_heads, train_heads
from mae_et.evaluation.knn import knn_votes
from mae_et.evaluation.segmentation import SegmentationScores, label_map
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.sizes import Size, as_size
from mae_et.models.vit import random_vit
from mae_et.runs.folder import RunFolder, spread
from mae_et.runs.provenance import describe_weights, peak_memory_mb
from mae_et.runs.record_files import write_record
from mae_et.runs.records import ChosenHead, DenseProbeSummary, DenseScores
from mae_et.storage.atomic import atomic_path
from mae_et.tasks.features import FeatureOptions, feature_function, normalisation, open_encoder

BATCH_SIZE = 16
NUM_BAD_SHOWN = 5  # unreadable files in the notes; all are counted
MIN_LABELLED = 0.5  # of the pixels of a training patch


def dense_probe(
    config: DenseProbeConfig, work_dir: str | Path, resume: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Trains a linear head on patch features of the training images and scores the maps of the validation images.

    Images are resized to S x T px. A training patch has the share of each class among its pixels as its target. On a validation
    image the scores of the patches are enlarged bilinearly to the mask's own size.

    Args:
        config: as checked.
        work_dir: gets config.py, environment.json, run.log, summary.json and per_class.csv.
        resume: repeat a finished probe of the same config.
        device: "cpu" or "cuda"; None: CUDA where available.
    Returns:
        The summary, as in summary.json.
    Raises:
        UserError: what the user can fix; see errors.py.
    """
    with join_world(device) as world:
        if world.size > 1:
            raise UserError(f"the dense probe runs in one process, not in {world.size}: start it without torchrun")
        train, val = (open_split(config.data, split) for split in ("train", "val"))
        if train.class_names != val.class_names:
            raise DataError("the class lists of the training and the validation masks differ: use the same categories")
        splits = [
            [split.pairs[i] for i in spread(len(split.pairs), limit)]
            for split, limit in ((train, config.data.max_train_images), (val, config.data.max_val_images))
        ]
        for pairs in splits:
            check_sizes(pairs)
        backbone = _Backbone.open(config, world)
        with RunFolder(Path(work_dir), config, world) as folder:
            folder.check_unused(resume)
            folder.describe()
            record = _probe(config, folder.path, backbone, train, val, *splits)
            write_record(folder.path / "summary.json", record)
            return record.model_dump(mode="json")


@dataclass(frozen=True)
class _Backbone:
    """A frozen encoder and how its images are prepared."""

    model: VisionTransformer
    patches: Callable[[Tensor], Tensor]  # [n, C, S, T] uint8 -> [n, L, D] float32
    image_size: Size
    world: World
    num_workers: int

    @property
    def patch_size(self) -> int:
        return int(self.model.patch_embed.patch_size[0])

    @classmethod
    def open(cls, config: DenseProbeConfig, world: World) -> _Backbone:
        data = config.data
        options = FeatureOptions(image_size=data.image_size, block=config.block)
        if config.backbone is None:
            torch.manual_seed(config.run.seed)
            size = data.image_size or 224
            model = random_vit(size, **config.model.encoder_options)
            metadata: dict[str, str] = {}
        else:
            model, found = open_encoder(config.backbone, options)
            metadata = dict(found)
        if config.block is not None and not -len(model.blocks) <= config.block < len(model.blocks):
            raise ConfigError(
                [f"block = {config.block} does not exist: the encoder has blocks 0 to {len(model.blocks) - 1}"]
            )
        model = model.to(world.device).eval().requires_grad_(False)
        size = as_size(model.patch_embed.img_size)
        mean, std = normalisation(metadata, model.in_chans, data.mean, data.std)
        tokens = feature_function(model, "patches", config.block)
        precision = choose_precision(world.device) if config.run.precision == "auto" else config.run.precision
        dtype = autocast_dtype(precision, world.device)

        @torch.inference_mode()
        def patches(images: Tensor) -> Tensor:
            with torch.autocast(world.device.type, dtype, enabled=dtype is not None):
                return tokens(crop_and_normalize(images.to(world.device), size, mean, std))

        workers = choose_num_workers(data.num_workers, 1, world.device.type == "cuda")
        return cls(model, patches, size, world, workers)

    def run(self, pairs: Sequence[Pair], title: str, bad: list[str]) -> Iterator[tuple[Sample, Tensor]]:
        """Yields each readable sample with its features [L, D]; adds the reasons of unreadable ones to `bad`."""
        loader = dense_loader(pairs, self.image_size, self.model.in_chans, BATCH_SIZE, self.num_workers)
        with reading(loader) as batches, tqdm(total=len(pairs), desc=title, unit="image", disable=None) as bar:
            for batch in batches:  # lists of samples
                bad += [sample.reason for sample in batch if sample.reason]
                if whole := [sample for sample in batch if not sample.reason]:
                    features = self.patches(torch.stack([sample.image for sample in whole]))
                    yield from zip(whole, features, strict=True)
                bar.update(len(batch))


@dataclass
class _Patches:
    """Training patches."""

    features: list[Tensor] = field(default_factory=list)  # [m, D] of each image
    targets: list[Tensor] = field(default_factory=list)  # [m, K] float32
    images: list[int] = field(default_factory=list)  # number of the image of each patch


def _probe(
    config: DenseProbeConfig,
    work_dir: Path,
    backbone: _Backbone,
    train: DenseSplit,
    val: DenseSplit,
    train_pairs: Sequence[Pair],
    val_pairs: Sequence[Pair],
) -> DenseProbeSummary:
    start, names = time.perf_counter(), train.class_names
    bad_train: list[str] = []
    bad_val: list[str] = []
    features, targets, images = _collect(config, backbone, train_pairs, len(names), bad_train)
    feature_seconds = time.perf_counter() - start
    chosen = _choose(config, features, targets, images)
    seed, pair = config.run.seed, (chosen.lr, chosen.weight_decay)
    heads = train_heads(features, targets, len(names), [pair], config.sweep.epochs, seed)

    scores = {name: SegmentationScores(len(names), IGNORE) for name in ("linear", "knn")}
    num_val = num_pixels = num_unlabelled = 0
    grid = grid_of(backbone.image_size, backbone.patch_size)
    for sample, patches in backbone.run(val_pairs, "validation images", bad_val):
        labels = sample.labels.to(patches.device).long()
        votes = knn_votes(features, targets, patches, config.knn.k, config.knn.temperature)
        for name, found in (("linear", heads.logits(patches, 0)), ("knn", votes)):
            predicted = label_map(found.T.unflatten(1, grid), (labels.shape[0], labels.shape[1]))
            scores[name].add(predicted, labels)
        num_val += 1
        num_pixels += labels.numel()
        num_unlabelled += int((labels == IGNORE).sum())
    if not num_val:
        raise DataError(f"none of the {len(val_pairs)} validation images can be read, e.g. {bad_val[0]}")
    if num_unlabelled == num_pixels:
        raise DataError(
            f"all pixels of the {num_val} validation masks are unlabelled, so there is nothing to score: check data.val_masks "
            "and the values in the class list"
        )
    _write_per_class(work_dir / "per_class.csv", names, scores)
    counts = {
        f"{name}_{what}": num
        for name, split in (("training", train), ("validation", val))
        for what, num in split.counts.items()
        if num
    }
    return DenseProbeSummary(
        **{name: _scores(found) for name, found in scores.items()},
        chosen=chosen,
        k=config.knn.k,
        temperature=config.knn.temperature,
        image_size=backbone.image_size,
        num_classes=len(names),
        num_train=len(train_pairs) - len(bad_train),
        num_val=num_val,
        num_patches=len(features),
        unreadable_train_images=len(bad_train),
        unreadable_val_images=len(bad_val),
        unlabelled_fraction=num_unlabelled / num_pixels,
        feature_seconds=feature_seconds,
        seconds=time.perf_counter() - start,
        peak_memory_mb=peak_memory_mb(),
        initial_weights=describe_weights(config.backbone),
        counts=counts,
        notes=[
            *edge_notes(chosen.lr, config.sweep.lrs),
            *(f"cannot be read: {reason}" for reason in [*bad_train, *bad_val][:NUM_BAD_SHOWN]),
        ],
    )


def _collect(
    config: DenseProbeConfig, backbone: _Backbone, pairs: Sequence[Pair], num_classes: int, bad: list[str]
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Returns features [M, D], targets [M, K] and the image of each patch [M] of the training images."""
    found, limit = _Patches(), max(1, config.max_patches // len(pairs))
    for sample, patches in backbone.run(pairs, "training images", bad):
        targets, labelled = patch_targets(sample.labels, backbone.image_size, backbone.patch_size, num_classes)
        kept = np.flatnonzero(labelled.numpy() >= MIN_LABELLED)
        kept = np.sort(np.random.default_rng([config.run.seed, sample.number]).permutation(kept)[:limit])
        found.features.append(patches[torch.from_numpy(kept).to(patches.device)])
        found.targets.append(targets[torch.from_numpy(kept)].to(patches.device))
        found.images += [sample.number] * len(kept)
    if len(bad) == len(pairs):
        raise DataError(f"none of the {len(pairs)} training images can be read, e.g. {bad[0]}")
    if len(found.images) < config.knn.k:
        raise DataError(
            f"the training masks leave {len(found.images)} labelled patches, fewer than knn.k = {config.knn.k}: label more "
            "pixels, use more images or larger max_patches, or lower k"
        )
    return torch.cat(found.features), torch.cat(found.targets), np.asarray(found.images)


def patch_targets(labels: Tensor, image_size: Size, patch_size: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Returns the share of each class among the labelled pixels of each patch.

    Args:
        labels: [H, W] int16, IGNORE where there is none. The map is resized to the image's S x T by its nearest pixels.
        image_size: (S, T).
        patch_size: p.
        num_classes: K.
    Returns:
        [L, K] float32, 0 for a patch without labels, and the labelled fraction of each patch, [L].
    """
    small = F.interpolate(labels[None, None].float(), size=image_size, mode="nearest-exact")[0, 0].long()
    height, columns = grid_of(image_size, patch_size)
    pixels = small.unflatten(1, (columns, patch_size)).unflatten(0, (height, patch_size))  # [h, p, w, p]
    pixels = pixels.transpose(1, 2).reshape(height * columns, patch_size**2)
    width = num_classes + 1
    keys = pixels.where(pixels != IGNORE, num_classes) + torch.arange(len(pixels))[:, None] * width
    counts = torch.bincount(keys.flatten(), minlength=len(pixels) * width).view(len(pixels), width)[:, :num_classes]
    known = counts.sum(dim=1, keepdim=True)
    return counts / known.clamp_min(1), known[:, 0] / patch_size**2


def grid_of(image_size: Size, patch_size: int) -> tuple[int, int]:
    """Returns the rows and columns of patches."""
    return image_size[0] // patch_size, image_size[1] // patch_size


def _choose(config: DenseProbeConfig, features: Tensor, targets: Tensor, images: np.ndarray) -> ChosenHead:
    """Chooses learning rate and weight decay on the patches of some training images."""
    pairs, seed = config.sweep.pairs, config.run.seed
    if len(pairs) == 1:
        return ChosenHead(seed=seed, lr=pairs[0][0], weight_decay=pairs[0][1], accuracy=None, num_images=0)
    numbers = np.random.default_rng(seed).permutation(np.unique(images))
    num = max(1, round(config.sweep.selection_fraction * len(numbers)))
    if num == len(numbers):
        raise DataError(
            f"{len(numbers)} training image leaves none to choose one of {len(pairs)} pairs on: use more images, or one value of "
            "sweep.lrs and sweep.weight_decays"
        )
    held = torch.from_numpy(np.isin(images, numbers[:num])).to(features.device)
    heads = train_heads(features[~held], targets[~held], targets.shape[1], pairs, config.sweep.epochs, seed)
    best, accuracies = score_heads(heads, features[held], targets[held])
    lr, decay = pairs[best]
    return ChosenHead(seed=seed, lr=lr, weight_decay=decay, accuracy=accuracies[best], num_images=num)


def _scores(found: SegmentationScores) -> DenseScores:
    return DenseScores(
        miou=float(found.iou().nanmean()),
        boundary_iou=float(found.boundary_iou().nanmean()),
        pixel_accuracy=found.accuracy(),
    )


def _write_per_class(path: Path, names: Sequence[str], scores: dict[str, SegmentationScores]) -> None:
    """Writes IoU and Boundary IoU of each class; empty where neither labels nor predictions have the class."""
    columns = {"num_pixels": scores["linear"].confusion.sum(dim=1).tolist()}
    for name, found in scores.items():
        for what, values in (("iou", found.iou()), ("boundary_iou", found.boundary_iou())):
            columns[f"{name}_{what}"] = ["" if math.isnan(value) else f"{value:.4f}" for value in values.tolist()]
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "name", *columns])
        rows.writerows([i, name, *row] for i, (name, *row) in enumerate(zip(names, *columns.values(), strict=True)))
