"""Linear probe with a sweep: many learning rates and weight decays on features that are computed once."""

from __future__ import annotations

import csv
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mae_et.config.schema import ClassifyConfig
from mae_et.errors import ConfigError
from mae_et.evaluation.heads import edge_notes, score_heads, train_heads
from mae_et.runs.records import ChosenHead, LinearSweepSummary
from mae_et.storage.atomic import atomic_path
from mae_et.tasks.cached_features import Features, Outcome, judge_features
from mae_et.tasks.run import TaskData

log = logging.getLogger(__name__)


def judge_by_sweep(
    config: ClassifyConfig, work_dir: str | Path, resume: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Extracts the features of both splits, trains linear heads on data.train and classifies data.val by the best one.

    The pair of learning rate and weight decay is chosen on a part of data.train. data.val takes no part in the choice. The
    work dir also gets sweep.csv, with the accuracy of each pair on that part.

    Args, returns and raises: as for `classify`.
    """
    return judge_features(config, work_dir, resume, device, _judge, LinearSweepSummary, gather=True, check=_check)


def _check(config: ClassifyConfig, data: TaskData, num_train: int) -> None:
    if len(config.sweep.pairs) > 1 and num_train <= len(data.class_names):
        raise _no_choice(num_train)


def _no_choice(num_train: int) -> ConfigError:
    return ConfigError(
        [
            f"the {num_train} labelled images that `labels` leaves are one for each class, so none is left to choose learning "
            'rate and weight decay on: use more labels, one value of sweep.lrs and sweep.weight_decays, or protocol = "knn"'
        ]
    )


def _judge(features: Features) -> Outcome | None:
    if not features.world.is_main:  # the heads are small: the main process trains them
        for _ in features.draws():
            pass
        return None
    start, scores, chosen, rows = time.perf_counter(), [], [], []
    notes: dict[str, None] = {}
    for seed, bank in features.draws():
        head, accuracies = choose(bank.outputs, bank.labels, features.config, len(features.class_names), seed)
        chosen.append(head)
        rows += [[seed, lr, decay, accuracy] for (lr, decay), accuracy in accuracies.items()]
        heads = train_heads(
            bank.outputs, bank.labels, len(features.class_names), [(head.lr, head.weight_decay)],
            features.config.sweep.epochs, seed,
        )  # fmt: skip
        scores.append(heads.logits(features.queries.outputs, 0))
        notes |= dict.fromkeys(edge_notes(head.lr, features.config.sweep.lrs))
    for note in notes:
        log.warning("%s", note)
    with atomic_path(features.work_dir / "sweep.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["seed", "lr", "weight_decay", "accuracy"], *rows])
    fields = {"chosen": chosen, "notes": list(notes), "sweep_seconds": time.perf_counter() - start}
    return Outcome(scores, ranks_classes=True, num_train=len(bank.labels), fields=fields)


def choose(
    features: Tensor, labels: Tensor, config: ClassifyConfig, num_classes: int, seed: int
) -> tuple[ChosenHead, dict[tuple[float, float], float]]:
    """Chooses a pair of learning rate and weight decay on a part of the training images.

    Args:
        features: [M, D] of the training images.
        labels: [M] int64.
        config: whose `sweep` holds the pairs.
        num_classes: K.
        seed: of the split and of the order of training.
    Returns:
        The best pair, and the accuracy of each pair on the part that it was not trained on; empty if there is one pair.
    Raises:
        ConfigError: if there are several pairs, but no class with two images.
    """
    pairs = config.sweep.pairs
    if len(pairs) == 1:
        return ChosenHead(seed=seed, lr=pairs[0][0], weight_decay=pairs[0][1], accuracy=None, num_images=0), {}
    fit, rest = split_by_class(labels.cpu().numpy(), config.sweep.selection_fraction, seed)
    if not len(rest):  # images that cannot be read are missing
        raise _no_choice(len(labels))
    heads = train_heads(features[fit], labels[fit], num_classes, pairs, config.sweep.epochs, seed)
    best, accuracies = score_heads(heads, features[rest], labels[rest])
    lr, decay = pairs[best]
    head = ChosenHead(seed=seed, lr=lr, weight_decay=decay, accuracy=accuracies[best], num_images=len(rest))
    return head, dict(zip(pairs, accuracies, strict=True))


def split_by_class(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits images within each class; a class always keeps an image in the first part, and gives one if it has several.

    Args:
        labels: [M] int64.
        fraction: of the second part.
        seed: of the split.
    Returns:
        The indices of both parts, ascending.
    """
    rest = []
    for label in np.unique(labels):
        own = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        num = min(len(own) - 1, max(1, round(fraction * len(own))))
        rest.append(own[:num])
    second = np.sort(np.concatenate(rest))
    return np.setdiff1d(np.arange(len(labels)), second), second
