"""The runs put together: pre-trainings grouped over their seeds, and each result with the pre-training that it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mae_et.errors import UserError
from mae_et.report.discover import discover
from mae_et.report.facts import is_constant, metadata_facts
from mae_et.report.groups import all_facts, check_keys, differing, group, holds, one_a_seed, parse_filter, recipe
from mae_et.report.lineage import backbone, connect, judges, starts_at_random
from mae_et.report.records import DUPLICATE, FINISHED, Run, text

UNTRAINED = "random weights"


@dataclass(eq=False)
class Origin:
    """Where backbones come from: pre-trainings equal but for the seed, a foreign file, or random weights."""

    label: str
    runs: list[Run] = field(default_factory=list)  # pre-trainings at hand
    facts: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def is_constant(self) -> bool:
        return is_constant(self.facts)


@dataclass
class Benchmark:
    """All records of a report. Each run is in `shown`, or in `problems`, or in `left_out`, and in one of them only."""

    shown: list[Run]
    problems: list[Run]
    left_out: list[Run]  # by the filter
    origins: list[Origin]
    origin_of: dict[Run, Origin]  # of each run shown but features and pictures
    baseline: Origin | None  # asked for
    filter: str | None = None
    group_by: tuple[str, ...] = ()

    @property
    def runs(self) -> list[Run]:
        return sorted([*self.shown, *self.problems, *self.left_out], key=lambda run: str(run.path))

    @property
    def notes(self) -> dict[str, list[str]]:
        """What was odd about runs that are in the tables all the same, with their names."""
        found: dict[str, list[str]] = {}
        for run in self.shown:
            for note in run.notes:
                found.setdefault(note, []).append(run.name)
        return found

    def of_kind(self, *kinds: str) -> list[Run]:
        return [run for run in self.shown if run.kind in kinds]


def make_benchmark(
    roots: Sequence[Path], baseline: str | None = None, filter: str | None = None, group_by: Sequence[str] = ()
) -> Benchmark:
    """Finds, joins and groups the runs below folders.

    Args:
        roots: folders.
        baseline: name of a run or label of a group that others are compared with; None: see `tables.choose_baseline`.
        filter: conditions, see `groups.parse_filter`.
        group_by: keys in which pre-trainings that are averaged agree; empty: all but the seed.
    Raises:
        UserError: if there is no run, no run has a key, or the baseline is unknown.
    """
    runs = discover(roots)
    connect(runs)
    conditions = parse_filter(filter) if filter else []
    check_keys([key for key, _, _ in conditions], runs, "--filter")
    check_keys(group_by, [run for run in runs if run.kind == "pretrain"] or runs, "--group-by")

    finished = [run for run in runs if run.status == FINISHED]
    origins, origin_of = _origins(finished, tuple(group_by))
    for own in origins:
        _drop_repetitions(own.runs, _own_replica)
    results = [run for run in finished if run.kind in ("classify", "detection", "segmentation") and judges(run) is None]
    for same in group(results, lambda run: [run.kind, origin_of[run].label, recipe(run)]).values():
        _drop_repetitions(same, _replica)
    for own in origins:
        own.runs = [run for run in own.runs if run.status == FINISHED]

    shown, problems, left_out = [], [], []
    for run in runs:
        run.facts["status"] = run.status
        if conditions and not holds(run, conditions):
            left_out.append(run)
        elif run.status == FINISHED:
            shown.append(run)
        else:
            problems.append(run)
    chosen = None if baseline is None else _find(baseline, origins, runs, origin_of)
    return Benchmark(shown, problems, left_out, origins, origin_of, chosen, filter, tuple(group_by))


def _origins(runs: Sequence[Run], group_by: tuple[str, ...]) -> tuple[list[Origin], dict[Run, Origin]]:
    """Groups the pre-trainings, and gives every result its origin."""
    trainings = [run for run in runs if run.kind == "pretrain"]

    def key(run: Run) -> Any:
        return [all_facts(run).get(name) for name in group_by] if group_by else recipe(run)

    origins, origin_of = [], {}
    for members in group(trainings, key).values():
        own = Origin("", members, members[0].facts, recipe(members[0]))
        origins.append(own)
        origin_of.update(dict.fromkeys(members, own))
    others: dict[str, Origin] = {}
    for run in runs:
        if run.kind not in ("classify", "detection", "segmentation"):
            continue
        training = run if judges(run) is None else judges(run)
        source = training.source if training is not None else None
        if source in origin_of:
            origin_of[run] = origin_of[source]
            continue
        label, facts = _foreign(training or run)
        own = others.setdefault(label, Origin(label, [], facts))
        origin_of[run] = own
    _label(origins, group_by)
    taken = {own.label for own in origins}
    for own in others.values():  # a foreign file may not pass for one of ours
        own.label = f"{own.label} (run not given)" if own.label in taken else own.label
    return [*origins, *others.values()], origin_of


def _foreign(run: Run) -> tuple[str, dict[str, Any]]:
    """Returns a label and facts for a backbone whose pre-training is not among the runs."""
    if starts_at_random(run):
        return UNTRAINED, {}
    told = backbone(run)
    if told is None:
        return "backbone not recorded", {}
    facts = metadata_facts(told)
    words = [facts.get("curriculum"), facts.get("model"), facts.get("data")]
    if "equivalent_epochs" in facts:
        words.insert(1, f"{facts['equivalent_epochs']:g} eq. epochs")
    if facts.get("step") != facts.get("num_steps"):
        words.append(f"step {facts.get('step', 0):g} of {facts.get('num_steps', 0):g}")
    if any(words[:1]):
        return ", ".join(str(word) for word in words if word), facts
    digest, file = text(told, "encoder_sha256"), text(told, "file")
    name = "/".join(Path(file).parts[-2:]) if file else "a file without a name"
    return (f"{name} ({digest[:8]})" if digest else name), facts


def _label(origins: list[Origin], group_by: tuple[str, ...]) -> None:
    """Gives each group a name of its own: curriculum and budget, and what else tells them apart."""
    for own in origins:
        if group_by:
            facts = all_facts(own.runs[0])
            own.label = ", ".join(f"{_shown(facts.get(key))}" for key in group_by)
            continue
        budget = own.facts.get("equivalent_epochs")
        words = [own.facts.get("curriculum") or own.runs[0].name]
        words += [f"{budget:g} eq. epochs"] if budget is not None else []
        own.label = ", ".join(words)
    for key in ("model", "target", "data"):
        for same in group_by_label(origins).values():
            if len({own.facts.get(key) for own in same}) > 1:
                for own in same:
                    own.label = f"{own.label}, {_shown(own.facts.get(key))}"
    for same in group_by_label(origins).values():
        if len(same) > 1:
            for own, more in zip(same, differing([own.recipe for own in same]), strict=True):
                own.label = f"{own.label}, {more or own.runs[0].name}"
    for same in group_by_label(origins).values():
        if len(same) > 1:
            for own in same:
                own.label = f"{own.label}, {own.runs[0].name}"


def group_by_label(origins: Sequence[Origin]) -> dict[str, list[Origin]]:
    groups: dict[str, list[Origin]] = {}
    for own in origins:
        groups.setdefault(own.label, []).append(own)
    return groups


def _shown(value: Any) -> str:
    return "not recorded" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _own_replica(run: Run) -> Any:
    """Returns what makes a pre-training another sample: its seed, and its config where others are in the group."""
    return None if run.facts.get("seed") is None else [run.facts["seed"], recipe(run)]


def _replica(run: Run) -> Any:
    """Returns what makes a result another sample: its backbone's weights, and its own seed where that has a say."""
    told: Mapping[str, Any] = backbone(run) or {}
    weights = text(told, "encoder_sha256") or text(told, "file") or (run.source.name if run.source else None)
    weights = UNTRAINED if weights is None and starts_at_random(run) else weights
    seed = run.facts.get("seed")
    if run.facts.get("protocol") == "knn" and weights not in (None, UNTRAINED):
        return [weights]  # nothing is drawn
    return None if weights is None or seed is None else [weights, seed]


def _drop_repetitions(runs: Sequence[Run], key: Callable[[Run], Any]) -> None:
    for run, first in one_a_seed(runs, key)[1]:
        run.fail(DUPLICATE, f"the same config, backbone and seed as {first.name!r}: not averaged with it")


def _find(name: str, origins: Sequence[Origin], runs: Sequence[Run], origin_of: Mapping[Run, Origin]) -> Origin:
    for own in origins:
        if own.label == name:
            return own
    named = [run for run in runs if name in (run.name, run.path.name) and run in origin_of]
    found = {origin_of[run].label: origin_of[run] for run in named}
    if len(found) == 1:
        return next(iter(found.values()))
    known = ", ".join(repr(own.label) for own in origins) or "none"
    many = f" is the name of runs of {len(found)} groups" if found else " is no finished run and no group"
    raise UserError(f"--baseline {name!r}{many}; groups: {known}")
