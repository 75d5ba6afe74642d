"""What a curriculum search can search: tasks, and how a trained one is scored. Larger scores are better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mae_et.config.schema import PretrainConfig
from mae_et.config.supervised import SupervisedConfig
from mae_et.config.training import TrainConfig
from mae_et.data.sources.spec import open_images
from mae_et.data.stream import choose_num_workers
from mae_et.errors import ConfigError, DataError
from mae_et.evaluation.classification import topk_correct
from mae_et.evaluation.label_free import rank_me
from mae_et.evaluation.linear import linear_predict
from mae_et.tasks.label_free import held_out_loss
from mae_et.tasks.pretrain import MAETask, knn_top1, mean_features
from mae_et.tasks.run import TaskData, TrainingTask
from mae_et.tasks.supervised import SupervisedTask

LABELLED = ("top1", "knn", "linear")  # scores that need labels


@dataclass(frozen=True)
class Searchable:
    """A task whose curriculum can be searched."""

    task_type: type[TrainingTask]
    open_data: Callable[[Any, str], TaskData]  # config, score
    scores: Mapping[str, Callable[[Any, TaskData], float]]  # by name, the default first; task, data


def searchable(config: TrainConfig) -> Searchable:
    """Returns how the curriculum of a config is searched."""
    return SEARCHABLE[type(config)]


def choose_score(config: TrainConfig, score: str | None) -> str:
    """Returns the name of the score; None stands for the default of the task.

    Raises:
        ConfigError: if the task has no such score.
    """
    known = searchable(config).scores
    if score is None:
        return next(iter(known))
    if score not in known:
        raise ConfigError(
            [f"score = {score!r} is not for a {config.folder} config; choose one of {', '.join(known)}"], "search"
        )
    return score


# ------------------------------------------------------------------------------------------------------------- MAE


def _open_mae_data(config: PretrainConfig, score: str) -> TaskData:
    if score in LABELLED:
        if config.data.val is None:
            raise DataError(
                f"score = {score!r} needs labelled images in data.val, which is None: set it, or use --score loss or rankme"
            )
        try:
            return MAETask.open_data(config)
        except DataError as error:
            raise DataError(
                f"score = {score!r} needs labels: {error}. Without labels use --score loss or rankme"
            ) from error
    if config.data.val is None and score == "loss":
        raise DataError(
            "score = 'loss' needs held-out images in data.val, which is None: set it, or use --score rankme"
        )
    train, val = (
        None if spec is None else open_images(config.data, spec, config.model.in_chans)
        for spec in (config.data.train, config.data.val)
    )
    assert train is not None
    return TaskData(train, val)


def _num_workers(task: MAETask) -> int:
    return choose_num_workers(task.config.data.num_workers, task.world.local_size, task.world.device.type == "cuda")


def _knn(task: MAETask, data: TaskData) -> float:
    assert data.val is not None
    bank, queries = (
        mean_features(task, source, _num_workers(task), gather=gather)[0]
        for source, gather in ((data.train, False), (data.val, True))
    )
    return knn_top1(bank, queries, task.world)


def _linear(task: MAETask, data: TaskData) -> float:
    assert data.val is not None
    bank, queries = (mean_features(task, source, _num_workers(task))[0] for source in (data.train, data.val))
    num_classes = 1 + int(max(bank.labels.max(), queries.labels.max()))
    predicted = linear_predict(bank.outputs, bank.labels, queries.outputs, num_classes)
    return float((predicted == queries.labels).double().mean())


def _rank_me(task: MAETask, data: TaskData) -> float:
    return rank_me(mean_features(task, data.val or data.train, _num_workers(task))[0].outputs)


def _held_out_loss(task: MAETask, data: TaskData) -> float:
    assert data.val is not None
    return -held_out_loss(task, data.val)


# ------------------------------------------------------------------------------------------------------ supervised


def _open_supervised_data(config: SupervisedConfig, score: str) -> TaskData:
    if config.data.val is None:
        raise DataError(f"score = {score!r} needs labelled images in data.val, which is None: set it")
    return SupervisedTask.open_data(config)


def _top1(task: SupervisedTask, data: TaskData) -> float:
    assert task.evaluation is not None  # there is data.val
    seen = task.evaluation.collect(None)
    return float(topk_correct(seen.outputs, seen.labels).double().mean())


SEARCHABLE: dict[type[TrainConfig], Searchable] = {
    PretrainConfig: Searchable(
        MAETask, _open_mae_data, {"knn": _knn, "linear": _linear, "loss": _held_out_loss, "rankme": _rank_me}
    ),
    SupervisedConfig: Searchable(SupervisedTask, _open_supervised_data, {"top1": _top1}),
}
