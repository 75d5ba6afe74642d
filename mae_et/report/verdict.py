"""The top of the page: a verdict for each comparison, what runs at the moment, and the totals."""

from __future__ import annotations

from dataclasses import dataclass

from mae_et.report.compare import Comparison, Verdict, cost_words, judge
from mae_et.report.join import UNTRAINED, Benchmark
from mae_et.report.query import make_frame
from mae_et.report.tables import Row, Table
from mae_et.runs.records import BACKBONE_KINDS


@dataclass(frozen=True)
class Tile:
    """A total in one line, and a second line of detail."""

    title: str
    value: str
    note: str


def make_verdicts(tables: list[Table]) -> list[Verdict]:
    """Returns a verdict for each difference in the tables: curricula against full size first, random weights last."""
    costs = {str(row.values["label"]): row for row in _rows(tables, "pretraining")}
    found = []
    for table in (table for table in tables if table.section == "transfer"):
        base = next((str(row.values["label"]) for row in table.rows if row.is_baseline), "")
        labels = {column.key: column.label for column in table.columns}
        for row in table.rows:
            for key, value in row.values.items():
                if isinstance(value, Comparison):
                    label = str(row.values["label"])
                    cost = _cost(costs.get(label), base)
                    place = table.title.split(": ", 1)[-1].split(" (")[0]
                    verdict = judge(value, label, base, labels[key.removesuffix(".delta")], place, cost)
                    found.append((UNTRAINED in (label, base), not cost, -min(value.ns), verdict))
    return [verdict for *_, verdict in sorted(found, key=lambda one: one[:3])]


def no_verdict(benchmark: Benchmark) -> Verdict:
    """Returns why the page compares nothing."""
    if not benchmark.results():
        return Verdict("Nothing is compared", ": no run here has a result on labelled images.")
    return Verdict(
        "Nothing is compared",
        ": no data set has results of two groups with the same recipe. Run the same evaluation on a pre-training at "
        "constant full size, or on random weights.",
    )


def make_tiles(benchmark: Benchmark, tables: list[Table]) -> list[Tile]:
    """Returns the totals of pre-training, cost and results."""
    return [_pretrained(benchmark), _total_cost(benchmark, tables), _results(benchmark)]


def _pretrained(benchmark: Benchmark) -> Tile:
    runs = benchmark.of_kind(*BACKBONE_KINDS)
    if not runs:
        return Tile(
            "Pre-training", "no pre-training given", "The origin of the results is read from their backbone files."
        )
    groups = {benchmark.origin_of[run] for run in runs}
    said = [
        _several(sorted({str(run.facts[key]) for run in runs if key in run.facts}))
        for key in ("model", "data", "target")
    ]
    parts = [part for part in (said[0], said[1] and f"on {said[1]}", said[2] and f"target: {said[2]}") if part]
    return Tile("Pre-training", f"{_count(len(runs), 'run')}, {_count(len(groups), 'recipe')}", "; ".join(parts))


def _total_cost(benchmark: Benchmark, tables: list[Table]) -> Tile:
    sums = (
        make_frame(benchmark.of_kind(*BACKBONE_KINDS))[["gpu_hours", "core_hours", "petaflops"]]
        .sum(min_count=1)
        .dropna()
    )
    units = {"gpu_hours": "GPU-hours", "core_hours": "core-hours", "petaflops": "PFLOP"}
    total = " · ".join(f"{value:.3g} {units[str(key)]}" for key, value in sums.items()) or "not recorded"
    rows = [row for row in _rows(tables, "pretraining") if isinstance(row.values.get("nominal"), float)]
    if not rows:
        return Tile("Cost of pre-training", total, "No pair of a curriculum and full size to compare.")
    row = max(rows, key=lambda row: float(row.values["nominal"]))  # type: ignore[arg-type]
    note = f"{row.values['label']}: {_cost(row, str(row.values['against']))}, against {row.values['against']}"
    return Tile("Cost of pre-training", total, note)


def _results(benchmark: Benchmark) -> Tile:
    runs = benchmark.results()
    if not runs:
        return Tile("Results", "none", "No run here evaluates a backbone.")
    names = sorted({str(run.facts.get("data", "data not recorded")) for run in runs})
    has_control = any(benchmark.origin_of[run].label == UNTRAINED for run in runs)
    control = (
        "Random weights were run as the control."
        if has_control
        else "Random weights were not run: there is no control."
    )
    return Tile("Results", f"{_count(len(runs), 'run')} on {_several(names)}", control)


def _cost(row: Row | None, baseline: str) -> str:
    """Returns the cost of a curriculum against the baseline, if the table of pre-trainings compares these two."""
    if row is None or row.values.get("against") != baseline:
        return ""
    return ", ".join(cost_words(*(row.values.get(key) for key in ("counted", "measured", "nominal"))))


def _rows(tables: list[Table], section: str) -> list[Row]:
    return [row for table in tables if table.section == section for row in table.rows]


def _several(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
