"""Joins runs: copies, evaluations with their training, results with their pre-training, seeds of one recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mae_et.errors import UserError
from mae_et.report.facts import describe, fact, is_constant, metadata_facts, recipe
from mae_et.report.query import check_columns, select
from mae_et.report.scan import BROKEN, DUPLICATE, FINISHED, RUNNING, UNFINISHED, Run, discover
from mae_et.report.searches import Search, find_searches
from mae_et.runs.records import (
    BACKBONE_KINDS,
    CLASSIFY_KINDS,
    DENSE_KINDS,
    DENSE_PROBE,
    DenseSummary,
    KnnSummary,
    PretrainSummary,
    SupervisedSummary,
    TestSummary,
)

UNTRAINED = "random weights"
RESULTS = ("supervised", *CLASSIFY_KINDS, DENSE_PROBE, *DENSE_KINDS)
MAIN_METRICS = {"detection": ("box_ap", "mask_ap"), "segmentation": ("miou", "miou_ms")}


@dataclass(eq=False)
class Origin:
    """Where weights come from: pre-trainings that differ in the seed only, a file without its run, or random weights."""

    label: str
    runs: list[Run] = field(default_factory=list)  # the pre-trainings
    facts: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def is_constant(self) -> bool:
        return is_constant(self.facts)


@dataclass
class Benchmark:
    """All runs of a report. Each is in exactly one of `shown`, `running`, `problems` and `left_out`."""

    shown: list[Run]
    running: list[Run]
    problems: list[Run]
    left_out: list[Run]  # by the query
    origins: list[Origin]
    origin_of: dict[Run, Origin]  # of pre-trainings and results
    baseline: Origin | None  # as asked for
    query: str | None = None
    group_by: tuple[str, ...] = ()
    searches: tuple[Search, ...] = ()

    @property
    def runs(self) -> list[Run]:
        return sorted([*self.shown, *self.running, *self.problems, *self.left_out], key=lambda run: str(run.path))

    @property
    def notes(self) -> dict[str, list[str]]:
        """Notes on runs that are in the tables, with the names of the runs."""
        found: dict[str, list[str]] = {}
        for run in self.shown:
            for note in run.notes:
                found.setdefault(note, []).append(run.name)
        return found

    def of_kind(self, *kinds: str) -> list[Run]:
        return [run for run in self.shown if run.kind in kinds]

    def results(self, *kinds: str) -> list[Run]:
        """Returns the runs with metrics; an evaluation counts with the training that it judges."""
        return [run for run in self.of_kind(*(kinds or RESULTS)) if has_result(run)]


def make_benchmark(
    roots: Sequence[Path], baseline: str | None = None, query: str | None = None, group_by: Sequence[str] = ()
) -> Benchmark:
    """Finds, joins and groups the runs below folders.

    Args:
        roots: folders.
        baseline: name of a run or label of a group that others are compared with; None: see `choose_baseline`.
        query: keeps the runs that `facts.select` keeps.
        group_by: columns in which averaged pre-trainings agree; empty: everything but the seed.
    Raises:
        UserError: if there is no run, the query is refused, a column does not exist, or the baseline is unknown.
    """
    check_columns(group_by, "--group-by")
    runs = discover(roots)
    _connect(runs)
    finished = [run for run in runs if run.status == FINISHED]
    origins, origin_of = _origins(finished, tuple(group_by))
    for own in origins:
        _drop_repetitions(own.runs, _pretraining_sample)
    results = [run for run in finished if run.kind in RESULTS and has_result(run)]
    for same in group(results, lambda run: [run.kind, origin_of[run].label, recipe(run)]):
        _drop_repetitions(same, result_sample)
    for own in origins:
        own.runs = [run for run in own.runs if run.status == FINISHED]
    for run in runs:
        run.facts["status"] = run.status
    kept = set(runs) if query is None else select(runs, query)
    if not kept and runs:
        raise UserError(f"no run fulfils --query {query!r}; tables/runs.csv of a report without it shows the values")
    kept_runs = [run for run in runs if run in kept]
    shown = [run for run in kept_runs if run.status == FINISHED]
    running = [run for run in kept_runs if run.status == RUNNING]
    problems = [run for run in kept_runs if run.status not in (FINISHED, RUNNING)]
    chosen = None if baseline is None else _find(baseline, origins, runs, origin_of)
    left_out = [run for run in runs if run not in kept]
    return Benchmark(
        shown,
        running,
        problems,
        left_out,
        origins,
        origin_of,
        chosen,
        query,
        tuple(group_by),
        tuple(find_searches(roots)),
    )


def choose_baseline(origins: Sequence[Origin]) -> Origin | None:
    """Returns the group at full size with the largest budget; without one, random weights; else None."""
    constant = [own for own in origins if own.is_constant]
    if constant:
        return max(constant, key=lambda own: own.facts.get("equivalent_epochs", 0))
    return next((own for own in origins if own.label == UNTRAINED), None)


def has_result(run: Run) -> bool:
    """Returns whether a run has metrics of its own; a supervised training without validation images has none."""
    return judges(run) is None and (run.kind != "supervised" or "top1" in run.facts)


def judges(run: Run) -> Run | None:
    """Returns the training that an evaluation in a folder of its own belongs to."""
    is_evaluation = run.summary is None and bool(run.tests)
    return run.source if is_evaluation and run.source is not None and run.source.kind == run.kind else None


def group(runs: Sequence[Run], key: Callable[[Run], Any]) -> list[list[Run]]:
    """Returns the runs with equal keys together, in the order in which the keys first appear."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(key(run), sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def differing(recipes: Sequence[Mapping[str, Any]], limit: int = 3) -> list[str]:
    """Returns for each recipe a text with the keys, at most `limit`, that are not the same in all."""
    keys = {key: None for one in recipes for key in one}
    shown = [key for key in keys if len({json.dumps(one.get(key), default=str) for one in recipes}) > 1][:limit]
    return [", ".join(f"{key.split('.')[-1]} {_short(one.get(key))}" for key in shown) for one in recipes]


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


# ---------------------------------------------------------------------------------------------------- between runs


def _connect(runs: list[Run]) -> None:
    """Sets what only shows between runs: copies, evaluations of trainings, sources. Then sets the facts."""
    _mark_duplicates(runs)
    _join_tests(runs)
    trained = {
        run.summary.encoder_sha256: run
        for run in runs
        if isinstance(run.summary, PretrainSummary | SupervisedSummary) and run.status == FINISHED
    }
    for run in runs:
        if run.kind != "pretrain" and run.source is None and run.weights is not None:
            found = trained.get(run.weights.encoder_sha256 or "")
            run.source = None if found is run else found
    for run in runs:
        run.facts = describe(run)
        names = MAIN_METRICS.get(run.kind, ())
        if run.status == FINISHED and names and judges(run) is None and not any(name in run.facts for name in names):
            run.fail(BROKEN, f"finished without a value of its metrics ({', '.join(names)})")
        if run.status == FINISHED and run.kind in (*BACKBONE_KINDS, *CLASSIFY_KINDS) and not run.config:
            run.notes.append("no config.py: described by summary.json alone")


def _mark_duplicates(runs: list[Run]) -> None:
    """Keeps one of the runs with the same result: a finished one before others, then the one with the shortest path."""
    seen: dict[tuple[str, str], Run] = {}
    for run in sorted(runs, key=lambda run: (run.status != FINISHED, len(run.path.parts), str(run.path))):
        if run.status == BROKEN:
            continue
        for mark, reason in _marks(run):
            first = seen.setdefault((run.kind, mark), run)
            is_certain = run.status in (UNFINISHED, RUNNING) or "earlier" not in reason
            if first is not run and run.status != DUPLICATE and is_certain:
                run.status, run.reason = DUPLICATE, f"{reason} {first.name!r}"


def _marks(run: Run) -> list[tuple[str, str]]:
    """Returns values that two runs share only if one is a copy or a repetition of the other."""
    marks = []
    digest = getattr(run.summary, "encoder_sha256", None) or getattr(run.summary, "weights_sha256", None)
    if digest:
        marks.append((digest, "the same weights as (a copy, or the same config and seed again)"))
    records = [run.summary] if run.summary is not None else run.tests
    if records:
        marks.append((json.dumps([record.model_dump(mode="json") for record in records]), "a copy of"))
    elif run.about:
        marks.append((json.dumps([run.about, run.path.name], sort_keys=True), "a copy of"))
    if run.first_line:  # holds a measured time: two runs hardly share it
        marks.append((run.first_line, "a copy, or an earlier state, of"))
    return marks


def _join_tests(runs: list[Run]) -> None:
    """Adds evaluations in folders of their own to the training whose weights they judge."""

    def key(record: DenseSummary | TestSummary) -> Any:
        return record.kind, record.weights_sha256, record.data, record.data_splits.get("val")

    trainings = {
        key(run.summary): run
        for run in runs
        if run.status == FINISHED and isinstance(run.summary, DenseSummary) and run.summary.weights_sha256
    }
    for run in runs:
        if run.status == FINISHED and run.summary is None:
            for test in list(run.tests):
                if (training := trainings.get(key(test))) is not None:
                    training.tests.append(test)
                    run.source = training
                    run.notes.append("an evaluation: shown in the row of the training whose weights it judges")


# ---------------------------------------------------------------------------------------------------- origins


def _origins(runs: Sequence[Run], group_by: tuple[str, ...]) -> tuple[list[Origin], dict[Run, Origin]]:
    """Groups the pre-trainings, and assigns an origin to every result."""
    origins, origin_of = [], {}
    trainings = [run for run in runs if run.kind in BACKBONE_KINDS]
    for members in group(trainings, lambda run: [fact(run, name) for name in group_by] if group_by else recipe(run)):
        own = Origin("", members, members[0].facts, recipe(members[0]))
        origins.append(own)
        origin_of.update(dict.fromkeys(members, own))
    others: dict[str, Origin] = {}
    for run in (run for run in runs if run.kind in RESULTS and run not in origin_of):
        training = judges(run) or run
        if training.source in origin_of:
            origin_of[run] = origin_of[training.source]
        else:
            label, facts = _foreign(training)
            origin_of[run] = others.setdefault(label, Origin(label, [], facts))
    _label(origins, group_by)
    taken = {own.label for own in origins}
    for own in others.values():  # the label of a file must not equal that of one of the runs
        own.label = f"{own.label} (run not given)" if own.label in taken else own.label
    return [*origins, *others.values()], origin_of


def _foreign(run: Run) -> tuple[str, dict[str, Any]]:
    """Returns a label and facts for weights whose pre-training is not among the runs."""
    weights = run.weights
    if weights is None:
        return UNTRAINED, {}
    facts = {} if weights.role == "model" else metadata_facts(weights.metadata)
    words = [facts.get("curriculum"), facts.get("model"), facts.get("data")]
    if "equivalent_epochs" in facts:
        words.insert(1, f"{facts['equivalent_epochs']:g} eq. epochs")
    if facts.get("step") != facts.get("num_steps"):
        words.append(f"step {facts.get('step', 0):g} of {facts.get('num_steps', 0):g}")
    if words[0]:
        return ", ".join(str(word) for word in words if word), facts
    name, digest = "/".join(Path(weights.file).parts[-2:]), weights.encoder_sha256 or weights.sha256
    if facts.get("target") == "class labels":
        name = f"supervised {facts.get('model') or name}"
    return (f"{name} ({digest[:8]})" if digest else name), facts


def _label(origins: list[Origin], group_by: tuple[str, ...]) -> None:
    """Gives each group a name of its own: curriculum and budget, then what else distinguishes it."""
    for own in origins:
        if group_by:
            own.label = ", ".join(_shown(fact(own.runs[0], key)) for key in group_by)
        else:
            budget = own.facts.get("equivalent_epochs")
            words = [own.facts.get("curriculum") or own.runs[0].name]
            words += [] if budget is None else [f"{budget:g} eq. epochs"]
            own.label = ", ".join(words)
    for key in ("model", "target", "data"):
        for same in _same_label(origins):
            if len({own.facts.get(key) for own in same}) > 1:
                for own in same:
                    own.label = f"{own.label}, {_shown(own.facts.get(key))}"
    for same in _same_label(origins):
        for own, more in zip(same, differing([own.recipe for own in same]), strict=True):
            own.label = f"{own.label}, {more or own.runs[0].name}"
    for same in _same_label(origins):
        for own in same:
            own.label = f"{own.label}, {own.runs[0].name}"


def _same_label(origins: Sequence[Origin]) -> list[list[Origin]]:
    groups: dict[str, list[Origin]] = {}
    for own in origins:
        groups.setdefault(own.label, []).append(own)
    return [same for same in groups.values() if len(same) > 1]


def _shown(value: Any) -> str:
    return "not recorded" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _pretraining_sample(run: Run) -> Any:
    """Returns what makes a pre-training another sample: its seed, and its recipe where others are in the group."""
    return None if run.facts.get("seed") is None else [run.facts["seed"], recipe(run)]


def has_own_seed(run: Run) -> bool:
    """Returns whether a result depends on its own seed; kNN on given weights does so only if labels are drawn."""
    draws = isinstance(run.summary, KnnSummary) and bool(run.summary.top1_by_draw)
    return run.kind != "knn" or run.weights is None or draws


def result_sample(run: Run) -> Any:
    """Returns what makes a result another sample: its weights, and its own seed where the task draws numbers."""
    weights, seed = run.weights, run.facts.get("seed")
    if weights is not None and not has_own_seed(run):
        return [weights.encoder_sha256 or weights.file]
    return None if seed is None else [UNTRAINED if weights is None else weights.encoder_sha256 or weights.file, seed]


def _drop_repetitions(runs: Sequence[Run], key: Callable[[Run], Any]) -> None:
    firsts: dict[str, Run] = {}
    for run in runs:
        if (value := key(run)) is not None:
            first = firsts.setdefault(json.dumps(value, default=str), run)
            if first is not run:
                run.fail(DUPLICATE, f"the same config, backbone and seed as {first.name!r}: not averaged with it")


def _find(name: str, origins: Sequence[Origin], runs: Sequence[Run], origin_of: Mapping[Run, Origin]) -> Origin:
    for own in origins:
        if own.label == name:
            return own
    found = {
        origin_of[run].label: origin_of[run] for run in runs if name in (run.name, run.path.name) and run in origin_of
    }
    if len(found) == 1:
        return next(iter(found.values()))
    known = ", ".join(repr(own.label) for own in origins) or "none"
    fault = f"is the name of runs of {len(found)} groups" if found else "is neither a finished run nor a group"
    raise UserError(f"--baseline {name!r} {fault}; groups: {known}")
