"""The first screen: what was pre-trained, what it cost, what it is worth."""

from __future__ import annotations

from dataclasses import dataclass

from mae_et.report.benchmark import UNTRAINED, Benchmark
from mae_et.report.groups import Difference, Statistic
from mae_et.report.tables import Row, Table
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
        return Tile(
            "Pre-trained",
            "no pre-training given",
            "Results are shown with what their backbone files say of their origin.",
        )
    groups = {benchmark.origin_of[run] for run in runs}
    said = [
        _several(sorted({str(run.facts[key]) for run in runs if key in run.facts}))
        for key in ("model", "data", "target")
    ]
    parts = [part for part in (said[0], said[1] and f"on {said[1]}", said[2] and f"target: {said[2]}") if part]
    return Tile("Pre-trained", f"{_count(len(runs), 'run')}, {_count(len(groups), 'recipe')}", "; ".join(parts))


def _cost(benchmark: Benchmark, tables: list[Table]) -> Tile:
    runs = benchmark.of_kind("pretrain")
    totals = []
    for key, unit in (("gpu_hours", "GPU-hours"), ("core_hours", "core-hours"), ("petaflops", "PFLOP")):
        values = [run.facts[key] for run in runs if key in run.facts]
        if values:
            totals.append(f"{sum(values):.3g} {unit}")
    row = _fastest(tables)
    if row is None:
        return Tile("Cost", " · ".join(totals) or "not recorded", "No pair of curriculum and full size to compare.")
    words = {"counted": "fewer FLOPs", "measured": "less wall time", "nominal": "nominal"}
    columns = {column.key: column for table in tables if table.section == "pretraining" for column in table.columns}
    ratios = [f"{shown(row.values[key], columns[key])}x {word}" for key, word in words.items() if row.values.get(key)]
    note = f"{row.values['label']}: {', '.join(ratios)}, against {row.values['against']}"
    return Tile("Cost", " · ".join(totals) or "not recorded", note)


def _fastest(tables: list[Table]) -> Row | None:
    """Returns the group with the largest nominal speed-up."""
    rows = [row for table in tables if table.section == "pretraining" for row in table.rows]
    found = [(value, row) for row in rows if isinstance(value := row.values.get("nominal"), float)]
    return max(found, key=lambda one: one[0])[1] if found else None


def _worth(tables: list[Table]) -> Tile:
    """Says one metric against the baseline, whichever way it went: that with most runs, of the group that the cost names."""
    fastest = _fastest(tables)
    named = fastest.values["label"] if fastest else None
    found, alone = [], []
    for table in (table for table in tables if table.section == "transfer"):
        keys = {column.key: column for column in table.columns}
        for row in (row for row in table.rows if not row.published and row.values["label"] != UNTRAINED):
            for column in table.columns:
                value, change = row.values.get(column.key), row.values.get(f"{column.key}.delta")
                if isinstance(value, Statistic):
                    alone.append((value.n, table, row, column))
                if isinstance(value, Statistic) and isinstance(change, Difference):
                    delta = keys[f"{column.key}.delta"]
                    found.append(((row.values["label"] == named, value.n), table, row, column, delta, change))
    if found:
        _, table, row, column, delta, change = max(found, key=lambda one: one[0])
        base = next((one for one in table.rows if one.is_baseline), None)
        against = base.values["label"] if base else "the baseline"
        if change.error is None:
            verdict = "single runs: no uncertainty"
        elif abs(change.value) < 2 * change.error:
            verdict = "less than two standard errors: no difference shown"
        else:
            verdict = "more than two standard errors"
        return Tile(
            "Worth",
            f"{column.label} {shown(row.values[column.key], column)}",
            f"{row.values['label']} on {_place(table)}; {shown(change, delta)} against {against} ({verdict})",
        )
    if alone:
        _, table, row, column = max(alone, key=lambda one: one[0])
        return Tile(
            "Worth",
            f"{column.label} {shown(row.values[column.key], column)}",
            f"{row.values['label']} on {_place(table)}; nothing to compare it with",
        )
    return Tile("Worth", "not measured", "No result on labelled images is among these runs.")


def _place(table: Table) -> str:
    return table.title.split(": ", 1)[-1]


def _several(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
