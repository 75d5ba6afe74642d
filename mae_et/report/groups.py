"""Runs that differ in nothing but the seed, and what they say together."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from mae_et.config.schema import RESUME_FREE
from mae_et.config.validation import flat
from mae_et.errors import UserError
from mae_et.report.facts import config_facts
from mae_et.report.records import Run

SEED = {"run.seed", "randomness.seed"}
# Of mmengine's configs: where things lie and what is shown; none of it changes a result.
PLACES = re.compile(
    r"(^|\.)(work_dir|data_root|ann_file|checkpoint|load_from|resume|launcher|filename|save_dir|num_workers|persistent_workers)$"
    r"|^(default_hooks|custom_hooks|visualizer|vis_backends|env_cfg|log_level|log_processor|launcher|custom_imports)\b|init_cfg"
)
CONDITION = re.compile(r"\s*([\w.]+)\s*(!=|<=|>=|=|<|>|~)\s*(.*?)\s*")


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation of n values; of one value no deviation."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean minus the baseline's mean, with Welch's standard error; none where a side has one value only."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Ratio:
    """One mean over another, with its standard error; none where a side has one value only."""

    value: float
    error: float | None


def ratio(over: Statistic, under: Statistic) -> Ratio | None:
    """Returns over / under; the relative error is sqrt(sd1^2 / n1 / mean1^2 + sd2^2 / n2 / mean2^2), to first order."""
    if under.mean == 0 or over.mean == 0:
        return None
    value, error = over.mean / under.mean, None
    if over.sd is not None and under.sd is not None:
        error = abs(value) * math.hypot(
            *(one.sd / math.sqrt(one.n) / one.mean for one in (over, under) if one.sd is not None)
        )
    return Ratio(value, error)


def summarize(values: Sequence[float | None]) -> Statistic | None:
    """Returns the statistic of the values that are there; None of none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Statistic(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def difference(ours: Statistic | None, baseline: Statistic | None) -> Difference | None:
    """Returns ours minus the baseline; the error is sqrt(sd1^2 / n1 + sd2^2 / n2).

    Source: Welch (1947), the standard error of the difference of two means of unequal variances.
    """
    if ours is None or baseline is None:
        return None
    error = None
    if ours.sd is not None and baseline.sd is not None:
        error = math.sqrt(ours.sd**2 / ours.n + baseline.sd**2 / baseline.n)
    return Difference(ours.mean - baseline.mean, error)


def recipe(run: Run) -> dict[str, Any]:
    """Returns what a run was asked to do, by dotted key: all that may change its result but seed and backbone."""
    if run.kind in ("pretrain", "classify"):
        kept = {key: value for key, value in config_facts(run).items() if key not in RESUME_FREE | SEED}
        names: tuple[str, ...] = ("data", "dataset_size", "model", "curriculum", "protocol", "equivalent_epochs")
    else:
        kept = {key: value for key, value in flat(run.config) if key not in SEED and not PLACES.search(key)}
        names = ("data", "model", "backbone_type", "config", "max_iters")
    return {**{name: run.facts.get(name) for name in (*names, "num_val", "num_classes")}, **kept}


def group(runs: Sequence[Run], key: Callable[[Run], Any]) -> dict[str, list[Run]]:
    """Returns the runs by the value of a key, in the order in which the values first appear."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(key(run), sort_keys=True, default=str), []).append(run)
    return groups


def one_a_seed(runs: Sequence[Run], key: Callable[[Run], Any]) -> tuple[list[Run], list[tuple[Run, Run]]]:
    """Splits runs that are to be averaged into the first of each key, and (repetition, first); a key of None is never one."""
    firsts: dict[str, Run] = {}
    kept, repeated = [], []
    for run in runs:
        value = key(run)
        first = run if value is None else firsts.setdefault(json.dumps(value, default=str), run)
        if first is run:
            kept.append(run)
        else:
            repeated.append((run, first))
    return kept, repeated


def differing(recipes: Sequence[Mapping[str, Any]], most: int = 3) -> list[str]:
    """Tells recipes apart: for each a text of the keys that are not the same in all, the first `most` of them."""
    keys = {key: None for one in recipes for key in one}
    shown = [key for key in keys if len({json.dumps(one.get(key), default=str) for one in recipes}) > 1][:most]
    return [", ".join(f"{key.split('.')[-1]} {_short(one.get(key))}" for key in shown) for one in recipes]


def _short(value: Any) -> str:
    said = f"{value:g}" if isinstance(value, float) else str(value)
    return said if len(said) <= 24 else f"{said[:21]}..."


# -------------------------------------------------------------------- --filter


def parse_filter(expression: str) -> list[tuple[str, str, str]]:
    """Splits "curriculum~etpp, equivalent_epochs>=100" into conditions that all have to hold.

    Raises:
        UserError: if a part is no KEY OPERATOR VALUE, or a pattern is no regular expression.
    """
    conditions = []
    for part in expression.split(","):
        match = CONDITION.fullmatch(part)
        if match is None:
            raise UserError(f"--filter {expression!r}: {part.strip()!r} is no KEY=VALUE; operators: = != < <= > >= ~")
        key, operator, value = match.groups()
        if operator == "~":
            try:
                re.compile(value)
            except re.error as error:
                raise UserError(f"--filter {expression!r}: {value!r} is no regular expression: {error}") from error
        conditions.append((key, operator, value))
    return conditions


def all_facts(run: Run) -> dict[str, Any]:
    """Returns what a filter may ask of a run: its facts, its config, and for the rest those of its pre-training."""
    own = {**config_facts(run), **run.facts}
    inherited = all_facts(run.source) if run.source is not None else {}
    return {**{key: value for key, value in inherited.items() if key not in ("kind", "name")}, **own}


def check_keys(keys: Sequence[str], runs: Sequence[Run], option: str) -> None:
    """Raises a UserError if no run has a key."""
    known = {key for run in runs for key in all_facts(run)} | {"data", "seed", "name", "kind", "status"}
    for key in keys:
        if key not in known:
            near = get_close_matches(key, known, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else f"; known: {', '.join(sorted(known)[:40])}"
            raise UserError(f"{option}: no run has {key!r}{hint}")


def holds(run: Run, conditions: Sequence[tuple[str, str, str]]) -> bool:
    """Tells whether a run fulfils all conditions; one without the key fulfils != alone."""
    facts = all_facts(run)
    return all(_holds(facts.get(key), operator, value) for key, operator, value in conditions)


def _holds(fact: Any, operator: str, wanted: str) -> bool:
    if fact is None:
        return operator == "!="
    if operator == "~":
        return re.search(wanted, str(fact)) is not None
    if isinstance(fact, (int, float)) and not isinstance(fact, bool):
        try:
            number = float(wanted)
        except ValueError:
            return operator == "!="
        return {
            "=": fact == number,
            "!=": fact != number,
            "<": fact < number,
            "<=": fact <= number,
            ">": fact > number,
            ">=": fact >= number,
        }[operator]
    said = str(fact)
    return {
        "=": said == wanted,
        "!=": said != wanted,
        "<": said < wanted,
        "<=": said <= wanted,
        ">": said > wanted,
        ">=": said >= wanted,
    }[operator]
