"""Protocols on features that are computed once, of the centre crop of each image: the wiring that they share.

Shapes: M readable training images, m those of this process, Q readable validation images, D width, K classes.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae_et.config.schema import ClassifyConfig
from mae_et.data.stream import choose_num_workers
from mae_et.engine.distributed import World, join_world
from mae_et.engine.precision import autocast_dtype
from mae_et.evaluation.classification import topk_correct, write_verdict
from mae_et.evaluation.collect import Collected, collect
from mae_et.models.linear_probe import pooled
from mae_et.runs.folder import RunFolder
from mae_et.runs.provenance import describe_weights, peak_memory_mb
from mae_et.runs.record_files import write_record
from mae_et.runs.records import KnnSummary, LinearSweepSummary
from mae_et.tasks.classification import open_labelled, preprocess
from mae_et.tasks.classifier import Backbone, build_encoder, open_backbone
from mae_et.tasks.label_subset import draw_subset
from mae_et.tasks.resolve import with_precision
from mae_et.tasks.run import TaskData, inspect_data


@dataclass(frozen=True)
class Features:
    """The features of both splits, and what a protocol needs besides."""

    config: ClassifyConfig
    world: World
    work_dir: Path
    class_names: list[str]
    bank: Collected  # training images; outputs [m, D] of this process, or [M, D] if the protocol gathers them
    queries: Collected  # validation images; outputs [Q, D]

    def draws(self) -> Iterator[tuple[int, Collected]]:
        """Yields (seed, training images) for each draw of labels; one draw if all labels are used."""
        config, sizes = self.config, self.world.gather(len(self.bank.outputs))
        is_whole = len(self.bank.outputs) == len(self.bank.labels)
        first = 0 if is_whole else sum(sizes[: self.world.rank])
        for seed in seeds(config):
            if config.labels.are_all:
                yield seed, self.bank
            else:
                drawn = draw_subset(self.bank.labels.cpu().numpy(), self.class_names, config.labels, seed)
                yield seed, select(self.bank, drawn, first)


@dataclass(frozen=True)
class Outcome:
    """What a protocol found, for each draw of labels."""

    scores: list[Tensor]  # [Q, K] of each draw, larger for likelier classes
    ranks_classes: bool  # whether the scores rank more than the first class
    num_train: int  # training images of a draw
    fields: dict[str, Any]  # of the protocol, for summary.json


Judge = Callable[[Features], Outcome | None]  # None: on other processes than the main one


def judge_features(
    config: ClassifyConfig,
    work_dir: str | Path,
    resume: bool,
    device: str | None,
    judge: Judge,
    record_type: type[KnnSummary] | type[LinearSweepSummary],
    gather: bool,
    check: Callable[[ClassifyConfig, TaskData, int], None],
) -> dict[str, Any]:
    """Computes the features of both splits, judges them and writes the results.

    Args:
        config: as checked.
        work_dir, resume, device: as for `classify`.
        judge: the protocol.
        record_type: of summary.json.
        gather: whether each process needs the training features of all processes.
        check: refuses what the protocol cannot do before the features are computed; it gets the images of the first draw.
    Returns and raises: as for `classify`.
    """
    with join_world(device) as world:
        config = with_precision(config, world.device)
        data = open_labelled(config)
        for seed in seeds(config):
            drawn = draw_subset(np.asarray(data.train.labels), data.class_names, config.labels, seed)
        check(config, data, len(drawn))
        backbone = open_backbone(config)
        with RunFolder(Path(work_dir), config, world) as folder:
            folder.check_unused(resume)
            world.barrier()  # every process has looked before the main one writes
            if world.is_main:
                folder.describe()
            findings = inspect_data(data, config.data, world)
            start = time.perf_counter()
            features = _compute(config, folder, data, backbone, gather)
            computed = time.perf_counter()
            outcome = judge(features)
            if outcome is None or not world.is_main:
                return {}
            record = record_type(
                **_verdict(features, outcome),
                **outcome.fields,
                initial_weights=describe_weights(config.backbone),
                num_train=outcome.num_train,
                unreadable_train_images=len(features.bank.bad_images),
                unreadable_val_images=len(features.queries.bad_images),
                seconds=time.perf_counter() - start,
                feature_seconds=computed - start,
                peak_memory_mb=peak_memory_mb(),
                data_findings=findings,
            )
            write_record(folder.path / "summary.json", record)
            return record.model_dump(mode="json")


def seeds(config: ClassifyConfig) -> range:
    """Returns the seeds of the draws of labels; one seed if all labels are used."""
    return range(config.run.seed, config.run.seed + (1 if config.labels.are_all else config.labels.num_draws))


def select(bank: Collected, kept: np.ndarray, first: int) -> Collected:
    """Returns some of the features, with the batch sizes that remain of each batch.

    Args:
        bank: of all processes together.
        kept: [n] int64, ascending numbers of the features to keep.
        first: number of the first feature of this process.
    """
    own = kept[(kept >= first) & (kept < first + len(bank.outputs))] - first
    ends = np.cumsum([0, *bank.batch_sizes])
    sizes = [int(size) for size in np.diff(np.searchsorted(own, ends)) if size]
    device = bank.outputs.device
    return dataclasses.replace(
        bank,
        outputs=bank.outputs[torch.from_numpy(own).to(device)],
        labels=bank.labels[torch.from_numpy(kept).to(device)],
        batch_sizes=sizes,
    )


def _compute(
    config: ClassifyConfig, folder: RunFolder, data: TaskData, backbone: Backbone | None, gather: bool
) -> Features:
    world, val = folder.world, data.val
    assert val is not None  # `open_labelled` opened it
    torch.manual_seed(config.run.seed)
    encoder = build_encoder(config, backbone).to(world.device).eval()
    dtype = autocast_dtype(config.run.precision, world.device)
    num_workers = choose_num_workers(config.data.num_workers, world.local_size, world.device.type == "cuda")

    def features(images: Tensor) -> Tensor:
        with torch.autocast(world.device.type, dtype, enabled=dtype is not None):
            return pooled(encoder, preprocess(images, config.data.image_size, config), config.model.pool)

    bank, queries = (
        collect(features, source, range(len(source)), config.data, world, num_workers, title, gather)
        for source, title, gather in (
            (data.train, "training features", gather),
            (val, "validation features", True),
        )
    )
    return Features(config, world, folder.path, list(data.class_names), bank, queries)


def _verdict(features: Features, outcome: Outcome) -> dict[str, Any]:
    """Writes the files of the verdict and returns the accuracies, means over the draws."""
    labels, num = features.queries.labels, len(outcome.scores)
    verdict = write_verdict(
        torch.cat(outcome.scores),
        labels.repeat(num),
        features.class_names,
        features.work_dir,
        outcome.ranks_classes,
        num,
    )
    if features.config.labels.are_all:
        return verdict
    by_draw = [float(topk_correct(scores, labels).double().mean()) for scores in outcome.scores]
    return {**verdict, "top1_by_draw": by_draw, "top1_sd": statistics.stdev(by_draw) if num > 1 else None}
