"""The first screen: what was pre-trained, what it cost, what it is worth."""

from __future__ import annotations

from dataclasses import dataclass

from mae_et.report.benchmark import UNTRAINED, Benchmark
from mae_et.report.groups import Difference, Statistic
from mae_et.report.tables import Table
from mae_et.report.text import shown


@dataclass(frozen=True)
class Tile:
    """A question answered in a line, and another line of detail."""

    title: str
    value: str
    note: str


def make_tiles(benchmark: Benchmark, tables: list[Table]) -> list[Tile]:
    """Returns the three tiles; those without an answer say what is missing."""
    return [_what(benchmark), _cost(benchmark, tables), _worth(tables)]


def _what(benchmark: Benchmark) -> Tile:
    runs = benchmark.of_kind("pretrain")
    if not runs:
        return Tile("Pre-trained", "no pre-training given", "Results are shown with what their backbone files say of their origin.")
    groups = {benchmark.origin_of[run] for run in runs}
    said = [_several(sorted({str(run.facts[key]) for run in runs if key in run.facts})) for key in ("model", "data", "target")]
    parts = [part for part in (said[0], said[1] and f"on {said[1]}", said[2] and f"target: {said[2]}") if part]
    return Tile("Pre-trained", f"{_count(len(runs), 'run')}, {_count(len(groups), 'recipe')}", "; ".join(parts))


def _cost(benchmark: Benchmark, tables: list[Table]) -> Tile:
    runs = benchmark.of_kind("pretrain")
    totals = []
    for key, unit in (("gpu_hours", "GPU-hours"), ("core_hours", "core-hours"), ("petaflops", "PFLOP")):
        values = [run.facts[key] for run in runs if key in run.facts]
        if values:
            totals.append(f"{sum(values):.3g} {unit}")
    faster = [
        (row, column)
        for table in tables
        if table.section == "pretraining"
        for row in table.rows
        for column in table.columns
        if column.key == "nominal" and row.values.get("nominal") is not None
    ]
    notes = []
    for row, column in faster:
        measured = row.values.get("measured")
        timed = f"{shown(measured, column)}x measured, " if measured is not None else ""
        notes.append((row.values["nominal"], f"{row.values['label']}: {timed}{shown(row.values['nominal'], column)}x nominal against {row.values['against']}"))
    note = max(notes, key=lambda pair: pair[0])[1] if notes else "No pair of curriculum and full size to compare times of."  # type: ignore[type-var,return-value]
    return Tile("Cost", " · ".join(totals) or "not recorded", note)


def _worth(tables: list[Table]) -> Tile:
    """Says the largest compared group's first metric against the baseline, whichever way it went."""
    for table in (table for table in tables if table.section == "transfer"):
        found = []
        for column in table.columns:
            delta = next((other for other in table.columns if other.key == f"{column.key}.delta"), None)
            for row in table.rows:
                value, change = row.values.get(column.key), row.values.get(f"{column.key}.delta")
                if delta and isinstance(value, Statistic) and isinstance(change, Difference) and row.values["label"] != UNTRAINED:
                    found.append((value.n, row, column, delta, value, change))
        if found:
            _, row, column, delta, value, change = max(found, key=lambda one: one[0])
            base = next((one for one in table.rows if one.is_baseline), None)
            against = base.values["label"] if base else "the baseline"
            if change.error is None:
                verdict = "single runs: no uncertainty"
            elif abs(change.value) < 2 * change.error:
                verdict = "less than two standard errors: no difference shown"
            else:
                verdict = "more than two standard errors"
            place = table.title.split(": ", 1)[-1]
            return Tile(
                "Worth", f"{column.label} {shown(value, column)}",
                f"{row.values['label']} on {place}; {shown(change, delta)} against {against} ({verdict})",
            )  # fmt: skip
        first = next(
            ((row, column) for row in table.rows for column in table.columns if isinstance(row.values.get(column.key), Statistic)), None
        )  # fmt: skip
        if first:
            row, column = first
            return Tile(
                "Worth", f"{column.label} {shown(row.values[column.key], column)}",
                f"{row.values['label']} on {table.title.split(': ', 1)[-1]}; nothing to compare it with",
            )  # fmt: skip
    return Tile("Worth", "not measured", "No result on labelled images is among these runs.")


def _several(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
