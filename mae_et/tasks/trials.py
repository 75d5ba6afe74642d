"""Carries out the trials of a curriculum search with the trainer. Several processes may share the folder of a search.

Each trial is a run in its own folder, with checkpoints, and a branch starts from the checkpoint of its trunk. A trial that
was stopped or killed resumes; one that is done has a record and is not run again. A lock, which the system removes with its
process, keeps other processes from a trial that is worked on.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import torch

from mae_et.config.schema import from_dict, to_dict
from mae_et.config.search import SearchConfig
from mae_et.config.training import TrainConfig
from mae_et.curriculum.cost import ModelCost
from mae_et.curriculum.plan import Plan, make_plan, schedule
from mae_et.curriculum.search.trial import Trial
from mae_et.engine.distributed import World
from mae_et.engine.progress import Progress
from mae_et.engine.trainer import Trainer
from mae_et.errors import ConfigError, NonFiniteError, StoppedEarly, UserError
from mae_et.models.sizes import Size, size_at
from mae_et.runs.folder import RunFolder
from mae_et.runs.record_files import read_record, write_record
from mae_et.runs.records import Resolved
from mae_et.runs.search import TRIAL, TRIALS, TrialRecord, record_of
from mae_et.storage.checkpoint import load_newest
from mae_et.tasks.run import TaskData, TrainingTask, identify, make_trainer
from mae_et.tasks.scores import Searchable

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 2.0  # at the trials of other processes
Watch = Callable[[int, float], bool]  # (number of the part of the budget that is done, score) -> stop the trial


class TrialRunner:
    """Plans, trains and scores trials.

    Args:
        config: of the training; a trial replaces its curriculum and its seed.
        settings: of the search, with candidates, proxy_epochs and score as used.
        kind: the task and its scores.
        cost: of the network.
        data: of all trials.
        work_dir: of the search.
    """

    def __init__(
        self,
        config: TrainConfig,
        settings: SearchConfig,
        kind: Searchable,
        cost: ModelCost,
        data: TaskData,
        work_dir: Path,
    ) -> None:
        self.config, self.settings, self.kind, self.cost = config, settings, kind, cost
        self.data, self.work_dir = data, work_dir

    # ---------------------------------------------------------------------------------------------------- plans

    def config_of(self, trial: Trial) -> TrainConfig:
        """Returns the config of the whole budget of a trial. The warm-up is the same part of each budget."""
        curriculum = self.config.curriculum
        budget = self.settings.budget * curriculum.baseline_equivalent_epochs
        whole = curriculum.baseline_equivalent_epochs if self.settings.algorithm == "backward" else budget
        warmup = curriculum.warmup_equivalent_epochs * trial.equivalent_epochs / whole
        return self._with(trial, trial.rows, trial.equivalent_epochs, warmup)

    def proxy_config_of(self, trial: Trial) -> TrainConfig:
        """Returns the config of the fine-tuning of a branch: full size and strength, half a cosine from the branch's lr to 0."""
        assert self.settings.proxy_epochs is not None
        plan = self.plan_of(trial)
        fraction = plan.compute_fraction(self.last_step(trial, plan))
        factor = schedule(fraction, plan.warmup_fraction)
        full = {"compute_fraction": 1.0, "bandwidth": min(self.config.data.image_size), "strength": 1.0}
        changes = {
            "optimizer": {**to_dict(self.config.optimizer), "base_lr": self.config.optimizer.base_lr * factor},
            "replay": {},
        }
        return self._with(trial, [full], self.settings.proxy_epochs, 0.0, **changes)

    def _with(
        self, trial: Trial, rows: Sequence[Any], equivalent_epochs: float, warmup: float, **changes: Any
    ) -> TrainConfig:
        values = to_dict(self.config)
        values["curriculum"] |= {
            "preset": "custom",
            "stages": [row if isinstance(row, dict) else row.model_dump() for row in rows],
            "equivalent_epochs": equivalent_epochs,
            "warmup_equivalent_epochs": warmup,
        }
        values["run"]["seed"] = trial.seed
        return from_dict(type(self.config), {**values, **changes}, f"trial {trial.name}")

    def _size_of(self, trial: Trial) -> Size:
        """Returns the size of the images at the end of a trial, px."""
        return size_at(trial.bandwidths[-1], self.config.data.image_size, self.cost.size_multiple)

    def plan_of(self, trial: Trial) -> Plan:
        return make_plan(self.config_of(trial), self.cost, len(self.data.train))

    def proxy_plan_of(self, trial: Trial) -> Plan:
        return make_plan(self.proxy_config_of(trial), self.cost, len(self.data.train))

    @staticmethod
    def first_step(trial: Trial, plan: Plan) -> int:
        """Returns the number of steps that the trunk of a trial has done."""
        return 0 if trial.start_from is None else _row_ends(plan)[trial.num_rows - 2]

    @staticmethod
    def last_step(trial: Trial, plan: Plan) -> int:
        """Returns the number of steps after which a trial is done."""
        return _row_ends(plan)[trial.num_rows - 1]

    def planned_cost(self, trial: Trial) -> float:
        """Returns the equivalent epochs, by area, that a trial and its proxy take.

        Raises:
            ConfigError: if a stage is too short for a step, or the model cannot take a bandwidth.
        """
        plan = self.plan_of(trial)
        first, last = self.first_step(trial, plan), self.last_step(trial, plan)
        if last <= first:
            band = trial.bandwidths[-1]
            raise ConfigError(
                [
                    f"the budget of {trial.equivalent_epochs:g} equivalent epochs is below one step for a stage at bandwidth "
                    f"{band}: raise budget or curriculum.baseline_equivalent_epochs, or lower batch.global_batch_size or stages"
                ],
                "search",
            )
        images = sum(
            max(0, min(last, stage.first_step + stage.num_steps) - max(first, stage.first_step))
            * stage.global_batch_size
            * stage.area_fraction
            for stage in plan.stages
        )
        proxy = self.proxy_plan_of(trial).planned_equivalent_epochs if trial.is_branch else 0.0
        return images / plan.dataset_size + proxy

    # ---------------------------------------------------------------------------------------------------- running

    def folder(self, trial: Trial) -> Path:
        return self.work_dir / TRIALS / trial.name

    @contextlib.contextmanager
    def lock(self, name: str, timeout: float = 0) -> Iterator[bool]:
        """Locks a name within the search. Yields whether this process has the lock."""
        folder = self.work_dir / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / f"{name}.lock", timeout=timeout)
        try:
            lock.acquire()
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def run_all(self, trials: Sequence[Trial], world: World) -> dict[str, TrialRecord]:
        """Carries out trials, sharing them with other processes on the same folder, and returns all their records."""
        records: dict[str, TrialRecord] = {}
        is_waiting = False
        while len(records) < len(trials):
            num_before = len(records)
            for trial in trials:
                if trial.name not in records:
                    with self.lock(trial.name) as is_ours:
                        if is_ours:
                            records[trial.name] = self.run(trial, world)
            if len(records) == num_before:
                if not is_waiting:
                    log.info("waiting for %d trials of other processes", len(trials) - num_before)
                is_waiting = True
                time.sleep(SECONDS_BETWEEN_LOOKS)
        return records

    def run(self, trial: Trial, world: World, watch: Watch | None = None) -> TrialRecord:
        """Trains and scores a trial, or reads its record if it is done. The caller has the lock.

        Args:
            trial: what to train.
            world: of one process.
            watch: gets the score after each `1 / stages` of the budget but the last, and may stop the trial.
        Raises:
            NonFiniteError: the training or its score is not finite.
            StoppedEarly: SIGTERM or Ctrl-C; everything is saved.
        """
        path = self.folder(trial) / TRIAL
        if path.exists():
            return read_record(path, TrialRecord)
        log.info("trial %s", trial.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            record = self._train_and_score(trial, world, watch)
        except NonFiniteError as error:
            raise NonFiniteError(f"trial {trial.name}: {error}") from error
        except StoppedEarly:
            raise StoppedEarly(
                f"stopped in trial {trial.name}. Everything is saved in {self.work_dir}: run the same command to continue"
            ) from None
        write_record(path, record)
        drop_checkpoints(self.folder(trial) / "proxy")
        log.info("trial %s: score %.5g", trial.name, record.score)
        return record

    def _train_and_score(self, trial: Trial, world: World, watch: Watch | None) -> TrialRecord:
        config, plan, folder = self.config_of(trial), self.plan_of(trial), self.folder(trial)
        with self._open(trial, config, plan, folder, world) as (task, trainer, is_new):
            if is_new and trial.start_from is not None:
                _, state = load_newest(self.work_dir / TRIALS / trial.start_from / "checkpoints", log.warning)
                trainer.load_state(state)
                trainer.progress.stages.clear()  # the time and images of the trunk are the trunk's
            pauses = self._pauses(plan) if watch is not None else []
            score, stopped = math.nan, False
            for number, step in enumerate(pauses, 1):
                if trainer.progress.step <= step:
                    trainer.fit(step)
                    score = self._score(trial, task)
                    stopped = watch is not None and watch(number, score)
                    if stopped:
                        break
            if not stopped:
                trainer.fit(self.last_step(trial, plan))
                score = math.nan if trial.is_branch else self._score(trial, task)
            progress = trainer.progress
        epochs, real_epochs, seconds = _spent(plan, progress)
        if trial.is_branch:
            score, more = self._proxy(trial, config, world)
            epochs, real_epochs, seconds = (a + b for a, b in zip((epochs, real_epochs, seconds), more, strict=True))
        return record_of(
            trial,
            status="pruned" if stopped else "finished",
            score=score,
            equivalent_epochs=epochs,
            real_epochs=real_epochs,
            seconds=seconds,
        )

    def _proxy(self, trial: Trial, config: TrainConfig, world: World) -> tuple[float, tuple[float, float, float]]:
        """Fine-tunes a copy of a branch at full size. Returns its score, and what it cost as `_spent` does.

        The weights themselves are judged, not their moving average, which hardly follows in so few steps.
        """
        plan = self.proxy_plan_of(trial)
        with self._open(trial, config, plan, self.folder(trial) / "proxy", world, is_proxy=True) as (
            task,
            trainer,
            is_new,
        ):
            if is_new:
                _, state = load_newest(self.folder(trial) / "checkpoints", log.warning)
                trainer.start_from(state, self._size_of(trial))
            progress = trainer.fit()
            return self._score(trial, task), _spent(plan, progress)

    @contextlib.contextmanager
    def _open(
        self, trial: Trial, config: TrainConfig, plan: Plan, folder: Path, world: World, is_proxy: bool = False
    ) -> Iterator[tuple[TrainingTask, Trainer, bool]]:
        """Yields the task and the trainer of a run, resumed from its own checkpoint if there is one, and whether there is none.

        A proxy has the network of its branch, so the task gets the branch's config, but a plan and an identity of its own.
        """
        torch.manual_seed(config.run.seed)
        task = self.kind.task_type(config, self.data, plan, world, folder)
        task.hooks = []  # the search scores; accuracies and pictures during a trial would cost more than it
        if is_proxy:
            task.ema = None
        own = self.proxy_config_of(trial) if is_proxy else config
        with RunFolder(folder, own, world) as run:
            identity = identify(own, task, self.data.train, plan, world)
            state = run.open(True, identity, plan, Resolved(precision=own.run.precision))
            if state is None and trial.start_from is None and not is_proxy:
                task.load_initial_weights()
            trainer = make_trainer(own, task, self.data.train, plan, identity)
            if state is not None:
                trainer.load_state(state)
            yield task, trainer, state is None

    def _score(self, trial: Trial, task: TrainingTask) -> float:
        task.model.eval()
        score = self.kind.scores[str(self.settings.score)](task, self.data)
        task.model.train()
        if not math.isfinite(score):
            raise NonFiniteError(
                f"trial {trial.name}: its score ({self.settings.score}) is {score}, so it cannot be compared. Lower "
                "optimizer.base_lr, or leave out its bandwidth"
            )
        return score

    def _pauses(self, plan: Plan) -> list[int]:
        num_parts = self.settings.stages
        steps = range(plan.num_steps)
        return [
            bisect.bisect_left(steps, part / num_parts - 1e-9, key=plan.compute_fraction)
            for part in range(1, num_parts)
        ]


def drop_checkpoints(folder: Path) -> None:
    """Deletes the checkpoints of a run that nothing starts from any more."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _row_ends(plan: Plan) -> list[int]:
    return [end for stage in plan.stages for end in stage.row_ends]


def _spent(plan: Plan, progress: Progress) -> tuple[float, float, float]:
    """Returns what was spent by the images that were shown: equivalent epochs by area, real epochs, seconds."""
    stats = [(plan.stages[index], stage) for index, stage in progress.stages.items()]
    areas = sum(seen.num_images * stage.area_fraction for stage, seen in stats)
    num_images = sum(seen.num_images for _, seen in stats)
    return areas / plan.dataset_size, num_images / plan.dataset_size, progress.seconds


def check_alone(world: World) -> None:
    """Refuses torchrun.

    Raises:
        UserError: if there are several processes.
    """
    if world.size > 1:
        raise UserError(
            f"a search runs each trial in one process, but torchrun started {world.size}: start the same command several "
            "times instead, with the same --work-dir and CUDA_VISIBLE_DEVICES=0, 1, ..."
        )
