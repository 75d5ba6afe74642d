"""kNN accuracy of a backbone's features: no training."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from mae_et.config.schema import ClassifyConfig
from mae_et.errors import ConfigError, DataError
from mae_et.evaluation.knn import knn_predict
from mae_et.runs.records import KnnSummary
from mae_et.tasks.cached_features import Features, Outcome, judge_features
from mae_et.tasks.run import TaskData


def judge_by_knn(
    config: ClassifyConfig, work_dir: str | Path, resume: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Extracts the features of both splits and classifies data.val by the nearest neighbours in data.train.

    Args, returns and raises: as for `classify`.
    """
    return judge_features(config, work_dir, resume, device, _judge, KnnSummary, gather=False, check=_check)


def _check(config: ClassifyConfig, data: TaskData, num_train: int) -> None:
    if max(config.knn.ks) > num_train:
        drawn = "" if config.labels.are_all else " that `labels` leaves"
        raise ConfigError(
            [f"knn.ks: k = {max(config.knn.ks)} exceeds the {num_train} labelled images of data.train{drawn}"]
        )


def _judge(features: Features) -> Outcome | None:
    config, queries = features.config, features.queries
    start, num_classes = time.perf_counter(), len(features.class_names)
    k = 20 if 20 in config.knn.ks else config.knn.ks[0]
    votes = []
    top1: dict[int, list[float]] = {number: [] for number in sorted(set(config.knn.ks))}
    for _, bank in features.draws():
        if max(config.knn.ks) > len(bank.labels):
            raise DataError(
                f"only {len(bank.labels)} images of data.train can be read, fewer than the {max(config.knn.ks)} neighbours of "
                "knn.ks: lower k or fix the images"
            )
        predictions = knn_predict(
            bank.outputs, bank.labels, queries.outputs, config.knn.ks, config.knn.temperature, num_classes, features.world,
            bank.batch_sizes,
        )  # fmt: skip
        for number, predicted in predictions.items():
            top1[number].append(float((predicted == queries.labels).double().mean()))
        votes.append(F.one_hot(predictions[k], num_classes).float())
    fields = {
        "k": k,
        "top1_by_k": {number: statistics.fmean(values) for number, values in top1.items()},
        "temperature": config.knn.temperature,
        "knn_seconds": time.perf_counter() - start,
    }
    return Outcome(votes, ranks_classes=False, num_train=len(bank.labels), fields=fields)
