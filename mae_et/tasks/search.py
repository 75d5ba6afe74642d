"""Searches a curriculum: estimates the cost, carries out the trials, writes what was found."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mae_et.config.files import save_config
from mae_et.config.schema import changed_keys, to_dict
from mae_et.config.search import SearchConfig
from mae_et.config.training import StageConfig, TrainConfig
from mae_et.curriculum.search.backward import backward, possible_runs
from mae_et.curriculum.search.sequential import sequential
from mae_et.curriculum.search.space import MAX_SHARE, full_size_trial, whole_trial
from mae_et.curriculum.search.trial import Found, Search, Space, Trial, find_candidates
from mae_et.engine.distributed import World, join_world
from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.runs.folder import describe_data
from mae_et.runs.provenance import describe_environment
from mae_et.runs.record_files import read_record, write_record
from mae_et.runs.records import Resolved
from mae_et.runs.search import (
    SEARCH,
    FoundRecord,
    Level,
    Row,
    SearchRecord,
    TrialRecord,
    read_trials,
    write_curriculum,
    write_search,
    write_table,
)
from mae_et.runs.search_picture import write_tree
from mae_et.storage.atomic import atomic_path
from mae_et.tasks.bayesian import BayesianSearch, import_optuna
from mae_et.tasks.resolve import with_precision
from mae_et.tasks.run import inspect_data
from mae_et.tasks.scores import choose_score, searchable
from mae_et.tasks.trials import TrialRunner, check_alone, drop_checkpoints

log = logging.getLogger(__name__)

MAY_GROW = frozenset({"trials"})  # settings that may change when a search is resumed


@dataclass(frozen=True)
class Estimate:
    """What a search will cost, in equivalent epochs by area."""

    settings: SearchConfig  # as used
    curriculum_epochs: float  # of the curriculum that is searched; backward: of the baseline
    num_trials: tuple[int, int]  # least and most
    equivalent_epochs: tuple[float, float]
    baseline_epochs: float
    proxy_epochs: float  # planned for all proxies; part of the above


class CurriculumSearch:
    """A search, checked and planned, that can be carried out.

    Args:
        config: of the training whose curriculum is searched. Its own stages are not used; its budget, batch, optimizer and
            warm-up are.
        settings: how to search.
        work_dir: gets search.json, trials.csv, tree.png, curriculum.py, config.py, environment.json and trials/.
    Raises:
        UserError: everything that is wrong before the first step: candidates, budget, labels.
    """

    def __init__(self, config: TrainConfig, settings: SearchConfig, work_dir: str | Path) -> None:
        kind = searchable(config)
        score = choose_score(config, settings.score)
        _check_config(config)
        if settings.algorithm == "bayesian":
            import_optuna()
        baseline = config.curriculum.baseline_equivalent_epochs
        cost = kind.task_type.cost(config)
        candidates = find_candidates(settings.candidates, config.data.image_size, cost.size_multiple)
        self.data = kind.open_data(config, score)
        used: dict[str, object] = {"score": score, "candidates": candidates}
        if settings.algorithm == "sequential":
            used["proxy_epochs"] = self._proxy_epochs(config, settings.proxy_epochs)
        self.settings = settings.model_copy(update=used)
        self.config, self.work_dir = config, Path(work_dir)
        first = config.run.seed
        num_noise = max(settings.noise_seeds, settings.repeats)
        self.space = Space(
            image_size=config.data.image_size,
            candidates=candidates,
            num_stages=settings.stages,
            equivalent_epochs=baseline * (1 if settings.algorithm == "backward" else settings.budget),
            seeds=tuple(range(first, first + settings.repeats)),
            noise_seeds=tuple(range(first, first + num_noise)),
            size_multiple=cost.size_multiple,
        )
        self.runner = TrialRunner(config, self.settings, kind, cost, self.data, self.work_dir)

    def estimate(self) -> Estimate:
        """Plans every trial and adds up what they cost. Nothing is trained.

        Raises:
            ConfigError: if a stage or a proxy is too short for a step, or the model cannot take a candidate.
        """
        if self.settings.algorithm == "bayesian":
            one = self.runner.planned_cost(full_size_trial(self.space, self.space.seeds[0]))
            num_noise, num_trials = len(self.space.noise_seeds), self.settings.trials * len(self.space.seeds)
            self._check_shortest_stage()
            return self._estimate([(num_noise + num_trials, one * (num_noise + num_trials))], 0.0)
        costs: dict[str, float] = {}
        totals = []
        num_branches = 0
        for trials in possible_runs(self._start) if self.settings.algorithm == "backward" else [self._all_trials()]:
            for trial in trials:
                if trial.name not in costs:
                    costs[trial.name] = self.runner.planned_cost(trial)
            totals.append((len(trials), sum(costs[trial.name] for trial in trials)))
            num_branches = sum(trial.is_branch for trial in trials)
        return self._estimate(totals, num_branches * (self.settings.proxy_epochs or 0.0))

    def run(self, device: str | None = None) -> SearchRecord:
        """Carries out the search, or resumes it, or joins the other processes that do.

        Args:
            device: "cpu" or "cuda"; None: CUDA where available.
        Returns:
            The record, as in search.json.
        Raises:
            UserError: what the user can fix; see errors.py.
        """
        estimate = self.estimate()
        with join_world(device) as world:
            check_alone(world)
            self._choose_precision(world)
            self._open_folder(estimate, world)
            inspect_data(self.data, self.config.data, world)
            if self.settings.algorithm == "bayesian":
                found = BayesianSearch(self.runner, self.space, world).search()
            else:
                found = self._drive(world)
            return self._write(found, estimate)

    # ------------------------------------------------------------------------------------------------------ parts

    def _proxy_epochs(self, config: TrainConfig, asked: float | None) -> float:
        """Returns the length of a proxy; None stands for a 60th of the baseline, but at least 10 steps."""
        one_step = config.batch.global_batch_size / len(self.data.train)
        if asked is None:
            return max(config.curriculum.baseline_equivalent_epochs / 60, 10 * one_step)
        if asked < one_step:
            raise ConfigError(
                [f"proxy_epochs = {asked:g} is below one step, which takes {one_step:.3g} equivalent epochs: raise it"],
                "search",
            )
        return asked

    def _start(self) -> Search:
        if self.settings.algorithm == "backward":
            return backward(self.space, self.settings.tolerance)
        return sequential(self.space)

    def _all_trials(self) -> list[Trial]:
        """Returns the trials of a search in which all scores are equal; any other scores lead to trials of equal cost."""
        search, trials = self._start(), dict[str, Trial]()
        batch = next(search)
        while True:
            trials |= {trial.name: trial for trial in batch}
            try:
                batch = search.send({trial.name: 0.0 for trial in batch})
            except StopIteration:
                return list(trials.values())

    def _drive(self, world: World) -> Found:
        """Answers the algorithm with the scores of its trials, and deletes the checkpoints that no later trial needs."""
        search, seen = self._start(), dict[str, Trial]()
        batch = next(search)
        while True:
            needed = {trial.name for trial in batch} | {trial.start_from for trial in batch}
            for name, trial in seen.items():
                if name not in needed:
                    drop_checkpoints(self.runner.folder(trial))
            seen |= {trial.name: trial for trial in batch}
            records = self.runner.run_all(batch, world)
            self._write_table()
            try:
                batch = search.send({name: record.score for name, record in records.items()})
            except StopIteration as stop:
                found: Found = stop.value
                return found

    def _check_shortest_stage(self) -> None:
        """Plans the shortest stage that the Bayesian search can suggest, at each candidate and at full size."""
        fraction = 1 / (1 + MAX_SHARE * (self.settings.stages - 1))
        smallest, full = self.space.candidates[0], self.space.full
        for first, part, last in [(band, fraction, full) for band in self.space.candidates] + [
            (smallest, 1 - fraction, full)
        ]:
            rows = (
                StageConfig(compute_fraction=part, bandwidth=first),
                StageConfig(compute_fraction=1 - part, bandwidth=last),
            )
            self.runner.planned_cost(whole_trial(self.space, "shortest", rows, self.space.seeds[0]))

    def _estimate(self, totals: Sequence[tuple[int, float]], proxy_epochs: float) -> Estimate:
        numbers, costs = [number for number, _ in totals], [cost for _, cost in totals]
        return Estimate(
            settings=self.settings,
            curriculum_epochs=self.space.equivalent_epochs,
            num_trials=(min(numbers), max(numbers)),
            equivalent_epochs=(min(costs), max(costs)),
            baseline_epochs=self.config.curriculum.baseline_equivalent_epochs,
            proxy_epochs=proxy_epochs,
        )

    def _choose_precision(self, world: World) -> None:
        """Replaces run.precision = "auto" by that of the first start of this search, or of the device."""
        stored = None
        with contextlib.suppress(OSError, ValueError):
            before = read_record(self.work_dir / SEARCH, SearchRecord)
            stored = Resolved(precision=before.config["run"]["precision"])
        self.config = self.runner.config = with_precision(self.config, world.device, stored)

    def _open_folder(self, estimate: Estimate, world: World) -> None:
        """Writes search.json, or compares it with this search if it is there.

        Raises:
            UserError: if the folder holds a search with other settings, or something else.
            CheckpointError: if the folder cannot be written.
        """
        record = SearchRecord(
            settings=self.settings,
            config=to_dict(self.config),
            data_fingerprint=describe_data(self.data.train)["data_fingerprint"],
            planned_equivalent_epochs=estimate.equivalent_epochs,
        )
        try:
            self.work_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot make the folder {self.work_dir}: {error}. Choose another --work-dir"
            ) from error
        with self.runner.lock("search", timeout=60):
            path = self.work_dir / SEARCH
            if not path.exists():
                if (self.work_dir / "checkpoints").exists() or (self.work_dir / "summary.json").exists():
                    raise UserError(f"{self.work_dir} holds a training run: choose another --work-dir for the search")
                write_search(self.work_dir, record)
                with atomic_path(self.work_dir / "config.py") as temporary:
                    save_config(self.config, temporary, "The resolved config whose curriculum is searched.")
                environment = describe_environment(world.device.type, world.size)
                write_record(self.work_dir / "environment.json", environment)
                return
            try:
                before = read_record(path, SearchRecord)
            except ValueError as error:
                raise UserError(f"{path} cannot be read: {error}. Choose another --work-dir") from error
        changes = changed_keys(to_dict(before.settings), to_dict(record.settings), MAY_GROW)
        changes += changed_keys(before.config, record.config)
        if before.data_fingerprint != record.data_fingerprint:
            changes.append("data.train: other images (their number or names differ)")
        if changes:
            raise UserError(
                f"{self.work_dir} holds a search with other settings:\n"
                + "\n".join(f"  - {change}" for change in changes)
                + "\nUndo these changes to continue it, or choose another --work-dir"
            )

    def _write_table(self, chosen: Sequence[str] = ()) -> list[TrialRecord]:
        trials = read_trials(self.work_dir)
        with self.runner.lock("table", timeout=60):
            write_table(self.work_dir, trials, chosen)
        return trials

    def _write(self, found: Found, estimate: Estimate) -> SearchRecord:
        """Writes search.json, trials.csv, tree.png and curriculum.py."""
        trials = self._write_table(found.trials)
        scores = [trial.score for trial in trials if trial.name in found.trials]
        result = FoundRecord(
            stages=[Row(**row.model_dump(include=set(Row.model_fields))) for row in found.rows],
            equivalent_epochs=found.equivalent_epochs,
            score=statistics.fmean(scores) if scores else math.nan,
            trials=list(found.trials),
            noise=found.noise,
            margin=found.margin,
            why=found.why,
            decisions=[Level.of(decision) for decision in found.decisions],
            num_trials=len(trials),
            spent_equivalent_epochs=sum(trial.equivalent_epochs for trial in trials),
            seconds=sum(trial.seconds for trial in trials),
        )
        record = SearchRecord(
            settings=self.settings,
            config=to_dict(self.config),
            data_fingerprint=describe_data(self.data.train)["data_fingerprint"],
            planned_equivalent_epochs=estimate.equivalent_epochs,
            found=result,
        )
        with self.runner.lock("search", timeout=60):
            how = (
                f"A curriculum found by the {self.settings.algorithm} search of mae_et: {self.settings.stages} stages, score "
                f"{self.settings.score}."
            )
            write_curriculum(self.work_dir / "curriculum.py", found.rows, found.equivalent_epochs, how)
            write_tree(self.work_dir, record, trials)
            write_search(self.work_dir, record)
        return record


def _check_config(config: TrainConfig) -> None:
    """Refuses what only fits a fixed list of stages.

    Raises:
        ConfigError: with each such option.
    """
    faults = []
    if config.batch.micro_batch_sizes:
        faults.append(
            "batch.micro_batch_sizes has one value for each stage, but the stages are searched: set batch.micro_batch_size"
        )
    if config.batch.early_large_batch.rule == "list":
        faults.append("batch.early_large_batch.rule = 'list' needs fixed stages, but they are searched: use 'area'")
    if config.replay.stages:
        faults.append("replay.stages has rows for fixed bandwidths, but they are searched: leave it empty")
    if config.curriculum.budget_hours is not None:
        faults.append(
            "curriculum.budget_hours has no effect here, because trials are compared at equal compute: remove it"
        )
    if faults:
        raise ConfigError(faults, "search")
