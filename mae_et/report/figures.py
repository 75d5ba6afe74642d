"""The figures and the numbers behind them. No text of a run is drawn: names stand in the legend, which the page escapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mae_et.report.benchmark import UNTRAINED, Benchmark, Origin
from mae_et.report.drawing import INK, MARKERS, Series, color_of, draw
from mae_et.report.groups import Statistic
from mae_et.report.records import FINISHED, UNFINISHED, Run, dig, number
from mae_et.report.tables import Table, statistic

MOST_POINTS = 300


@dataclass
class Figure:
    """A figure in one or several variants of an axis, each an SVG, and all its numbers."""

    id: str
    title: str
    variants: list[tuple[str, str]]  # label, SVG
    legend: list[Series]
    header: list[str]
    rows: list[list[Any]]
    note: str = ""


Line = tuple[Series, list[float], list[float]]


def make_figures(benchmark: Benchmark, tables: Sequence[Table]) -> list[Figure]:
    """Returns the figures that have something to show, in the order of the page."""
    series = {
        own: Series(i, own.label) for i, own in enumerate(own for own in benchmark.origins if own.label != UNTRAINED)
    }
    figures = [*_worth(benchmark, tables, series), *_curves(benchmark, series), *_curricula(benchmark, series)]
    published = [table for table in tables if table.id == "published_mae_pretraining"]
    return [*figures, *(_published(table) for table in published)]


# -------------------------------------------------------------------- accuracy against cost


def _worth(benchmark: Benchmark, tables: Sequence[Table], series: dict[Origin, Series]) -> Iterable[Figure]:
    """Draws each main metric over what the pre-training cost: a point for each group, bars of one standard deviation."""
    by_label = {own.label: own for own in series}
    costs = (("petaflops", "compute, PFLOP"), ("seconds", "wall time, s"), ("equivalent_epochs", "equivalent epochs"))
    for table in (table for table in tables if table.section == "transfer"):
        for column in table.columns:
            deltas = any(other.key == f"{column.key}.delta" for other in table.columns)
            points = [
                (by_label[str(row.values["label"])], stat)
                for row in table.rows
                if not row.published
                and isinstance(stat := row.values.get(column.key), Statistic)
                and str(row.values["label"]) in by_label
                and by_label[str(row.values["label"])].runs
            ]
            if not points or not (deltas or column.key.split(".")[-1] in ("top1", "box_ap", "mask_ap", "miou")):
                continue
            floor = [
                stat.mean
                for row in table.rows
                if row.values.get("label") == UNTRAINED and isinstance(stat := row.values.get(column.key), Statistic)
            ]
            variants, rows = [], []
            for key, label in costs:
                placed = [(own, cost, stat) for own, stat in points if (cost := statistic(own.runs, key)) is not None]
                if placed:
                    drawn, unit = _readable(placed, label)
                    variants.append(
                        (unit, _draw_worth(f"{table.id}-{column.key}-{key}", drawn, series, unit, column.label, floor))
                    )
                rows += [[own.label, key, cost.mean, cost.sd, stat.mean, stat.sd, stat.n] for own, cost, stat in placed]
            if variants:
                note = "Bars: one standard deviation over the runs." + (" Dashed: random weights." if floor else "")
                yield Figure(
                    f"worth_{table.id}_{column.key}".replace(".", "_"),
                    f"{column.label} against cost: {table.title.split(': ', 1)[-1].split(' (')[0]}",
                    variants,
                    [series[own] for own, _ in points],
                    ["pre-training", "cost", "cost mean", "cost sd", "value mean", "value sd", "n"],
                    rows,
                    note,
                )


def _readable(
    points: list[tuple[Origin, Statistic, Statistic]], label: str
) -> tuple[list[tuple[Origin, Statistic, Statistic]], str]:
    """Returns small compute in TFLOP, long times in hours; else what it was given."""
    most = max(cost.mean for _, cost, _ in points)
    for word, unit, is_due, factor in (("PFLOP", "TFLOP", most < 0.1, 1000.0), (", s", ", h", most > 7200, 1 / 3600)):
        if label.endswith(word) and is_due:
            return [
                (own, Statistic(cost.mean * factor, None if cost.sd is None else cost.sd * factor, cost.n), stat)
                for own, cost, stat in points
            ], label.removesuffix(word) + unit
    return points, label


def _draw_worth(
    salt: str,
    points: list[tuple[Origin, Statistic, Statistic]],
    series: dict[Origin, Series],
    xlabel: str,
    ylabel: str,
    floor: list[float],
) -> str:
    def paint(axes: Axes) -> None:
        for own, cost, stat in points:
            one = series[own]
            axes.errorbar(
                [cost.mean],
                [stat.mean],
                yerr=[stat.sd or 0.0],
                xerr=[cost.sd or 0.0],
                fmt=MARKERS[one.index % len(MARKERS)],
                color=color_of(one),
                markersize=8,
                capsize=3,
                elinewidth=1.2,
                gid=f"{salt}-{one.index}",
            )
        for value in floor[:1]:
            axes.axhline(value, color=INK, linewidth=1, linestyle="--", alpha=0.6)
        costs = [cost.mean for _, cost, _ in points]
        axes.margins(y=0.12)
        if min(costs) > 0 and max(costs) / min(costs) > 15:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
        else:
            axes.set_xlim(0, 1.1 * max(cost.mean + (cost.sd or 0.0) for _, cost, _ in points) or 1.0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))

    return draw(salt, paint, xlabel, ylabel)


# -------------------------------------------------------------------- loss and kNN over compute and time


def _curves(benchmark: Benchmark, series: dict[Origin, Series]) -> Iterable[Figure]:
    """Draws loss and kNN accuracy of the pre-trainings; those of other data or targets are in a figure of their own."""
    found = [run for run in [*benchmark.shown, *benchmark.problems] if run.kind == "pretrain" and run.metrics]
    found = [run for run in found if run.status in (FINISHED, UNFINISHED)]
    extra = {
        run: Series(len(series) + i, f"{run.name} ({run.status})")
        for i, run in enumerate(r for r in found if r.status == UNFINISHED)
    }
    for what, name, keys in (("loss", "Loss", ("data", "target")), ("knn/top1", "kNN accuracy, %", ("data",))):
        groups: dict[tuple[str, ...], list[Run]] = {}
        for run in found:
            if any(number(line, what) is not None for line in run.metrics):
                groups.setdefault(tuple(str(run.facts.get(key, "not recorded")) for key in keys), []).append(run)
        for i, (said, runs) in enumerate(groups.items()):
            lines = [(run, extra.get(run) or series[benchmark.origin_of[run]], curve(run, what)) for run in runs]
            rows = [[run.name, *point] for run, _, points in lines for point in points]
            name_of = what.split("/")[0]
            variants = []
            for axis, label in ((0, "equivalent epochs"), (1, "wall time, s")):
                drawn: list[Line] = [
                    (one, [p[axis] for p in points], [p[2] for p in points]) for _, one, points in lines
                ]
                settle = _cut_top(drawn) if name_of == "loss" else lambda axes: None
                variants.append(
                    (label, _draw_lines(f"{name_of}{i}-{axis}", drawn, label, name, settle, name_of == "knn"))
                )
            legend = list({one.index: one for _, one, _ in lines}.values())
            note = {
                "loss": "A line for each run. The loss of a smaller bandwidth is that of a smoother image: steps at the "
                "stages' ends are no jumps in quality. The very first points may lie above the frame.",
                "knn": "A line for each run, features at full image size throughout; a subset of the images "
                "(run.knn_max_images).",
            }[name_of]
            yield Figure(
                f"{name_of}_{i + 1}",
                f"{name} during pre-training: {', '.join(said)}",
                variants,
                legend,
                ["run", "equivalent epochs", "seconds", name_of],
                rows,
                note,
            )


def curve(run: Run, key: str) -> list[tuple[float, float, float]]:
    """Returns (equivalent epochs, seconds, value) of a logged quantity; between log lines the first two are interpolated."""
    logged = [(0.0, 0.0, 0.0)]
    for line in run.metrics:
        place = [number(line, name) for name in ("step", "equivalent_epochs", "seconds")]
        if None not in place:
            logged.append((place[0] or 0.0, place[1] or 0.0, place[2] or 0.0))
    points = []
    factor = 100 if key.startswith("knn") else 1
    for line in run.metrics:
        step, value = number(line, "step"), number(line, key)
        if step is None or value is None:
            continue
        before = max((place for place in logged if place[0] <= step), default=logged[0])
        after = min((place for place in logged if place[0] >= step), default=before)
        share = 0.0 if after[0] == before[0] else (step - before[0]) / (after[0] - before[0])
        points.append((*(b + share * (a - b) for b, a in zip(before[1:], after[1:], strict=True)), factor * value))
    return points  # type: ignore[return-value]


def _draw_lines(
    salt: str,
    lines: list[Line],
    xlabel: str,
    ylabel: str,
    settle: Callable[[Axes], None],
    marker: bool = False,
    steps: bool = False,
) -> str:
    def paint(axes: Axes) -> None:
        for i, (one, x, y) in enumerate(lines):
            thin = max(1, math.ceil(len(x) / MOST_POINTS))
            x, y = ([*values[::thin], *([] if (len(values) - 1) % thin == 0 else values[-1:])] for values in (x, y))
            axes.plot(
                x,
                y,
                color=color_of(one),
                linestyle=one.dash,
                gid=f"{salt}-{i}-{one.index}",
                marker=MARKERS[one.index % len(MARKERS)] if marker else None,
                markersize=3.5,
                drawstyle="steps-post" if steps else "default",
                linewidth=1.6 + (2.4 * (len(lines) - 1 - i) / len(lines) if steps else 0),  # one below another shows
            )
        axes.margins(y=0.08)
        axes.set_xlim(left=0)
        settle(axes)
        axes.xaxis.set_major_locator(MaxNLocator(6))

    return draw(salt, paint, xlabel, ylabel)


def _cut_top(lines: Sequence[Line]) -> Callable[[Axes], None]:
    """Returns what keeps the first twentieth of a run, where the loss falls from afar, from pressing the rest flat."""
    late = [y for _, x, values in lines for at, y in zip(x, values, strict=True) if at >= 0.05 * max(x)]
    low, high = min(late, default=0.0), max(late, default=1.0)

    def settle(axes: Axes) -> None:
        if high > low and axes.get_ylim()[1] > high + 0.5 * (high - low):
            axes.set_ylim(low - 0.08 * (high - low), high + 0.25 * (high - low))

    return settle


def _set_ticks(axes: Axes, ticks: list[float] | None) -> None:
    if ticks is not None and len(ticks) <= 8:
        axes.set_yticks(ticks)


# -------------------------------------------------------------------- the curriculum


def _curricula(benchmark: Benchmark, series: dict[Origin, Series]) -> Iterable[Figure]:
    """Draws bandwidth, learning rate and augmentation strength over the compute; a figure for each data set and model."""
    groups: dict[tuple[str, ...], list[tuple[Series, Run]]] = {}
    shown = set(benchmark.shown)
    for own, one in series.items():
        for run in [run for run in own.runs if run in shown][:1]:  # of the seeds the first: they have the same plan
            groups.setdefault(tuple(str(run.facts.get(key, "not recorded")) for key in ("data", "model")), []).append(
                (one, run)
            )
    for i, (said, members) in enumerate(groups.items()):
        variants, rows, legend = [], [], {}
        for key, label in (
            ("bandwidth", "bandwidth, px"),
            ("lr", "learning rate"),
            ("strength", "augmentation strength"),
        ):
            lines: list[Line] = []
            for one, run in members:
                x, y = bandwidth_steps(run) if key == "bandwidth" else _logged(run, key)
                if x:
                    lines.append((one, [100 * value for value in x], y))
                    legend[one.index] = one
                    rows += [[run.name, key, 100 * a, b] for a, b in zip(x, y, strict=True)]
            if lines:
                ticks = sorted({y for _, _, values in lines for y in values}) if key == "bandwidth" else None
                settle = partial(_set_ticks, ticks=ticks)
                svg = _draw_lines(f"curriculum{i}-{key}", lines, "compute done, %", label, settle, steps=key != "lr")
                variants.append((label, svg))
        if variants:
            yield Figure(
                f"curriculum_{i + 1}",
                f"The curriculum: {', '.join(said)}",
                variants,
                list(legend.values()),
                ["run", "what", "compute done, %", "value"],
                rows,
            )


def bandwidth_steps(run: Run) -> tuple[list[float], list[float]]:
    """Returns where in the compute (0 to 1) each bandwidth begins, and the last one's end."""
    stages = dig(run.plan, "stages") or dig(run.summary, "stages")
    if not isinstance(stages, list):
        return [], []
    bands = [number(stage, "bandwidth") for stage in stages]
    images = [number(stage, "num_images") for stage in stages]
    if None in bands or None in images or not bands:
        return [], []
    costs = [(band or 0.0) ** 2 * (count or 0.0) for band, count in zip(bands, images, strict=True)]
    total = sum(costs) or 1.0
    x = [sum(costs[:i]) / total for i in range(len(costs) + 1)]
    return x, [band or 0.0 for band in [*bands, bands[-1]]]


def _logged(run: Run, key: str) -> tuple[list[float], list[float]]:
    pairs = [(number(line, "compute_fraction"), number(line, key)) for line in run.metrics]
    kept = [(x, y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in kept], [y for _, y in kept]


# -------------------------------------------------------------------- the paper's


def _published(table: Table) -> Figure:
    """Draws the published accuracies over the cost that the published speed-ups mean; hollow, for they are not ours."""
    points = [
        (str(row.values["c0"]), 1600 / float(row.values["c2"]), float(row.values["c1"]))  # type: ignore[arg-type]
        for row in table.rows
    ]

    def paint(axes: Axes) -> None:
        for y in {y for _, _, y in points}:
            level = sorted((x, name) for name, x, own in points if own == y)
            up = round(10 * y) % 2 == 1 or y < 83.3
            for i, (x, name) in enumerate(level):
                lifted = i + 1 < len(level) and level[i + 1][0] - x < 200  # its label stands over the neighbour's
                is_theirs = name.startswith("EfficientTrain")
                color = color_of(Series(1, "")) if is_theirs else INK
                axes.plot([x], [y], "D" if is_theirs else "o", color=color, markerfacecolor="none", markersize=7)
                axes.annotate(
                    name,
                    (x, y),
                    (0, (7 + 12 * lifted) * (1 if up else -1)),
                    textcoords="offset points",
                    fontsize=9,
                    ha="left" if x < 600 else "center" if x < 1200 else "right",
                    va="bottom" if up else "top",
                )
        axes.set_xlim(0, 1800)
        axes.set_ylim(82.9, 83.95)

    rows: list[list[Any]] = [[name, x, y, table.rows[0].published] for name, x, y in points]
    return Figure(
        "published",
        "Published: accuracy against cost, ViT-B on ImageNet-1K",
        [("cost", draw("published", paint, "cost: 1600 / speed-up against MAE 1600", "fine-tuned top-1, %"))],
        [],
        ["method", "cost (1600 / speed-up)", "fine-tuned top-1", "source"],
        rows,
        f"Not ours: {table.rows[0].published}.",
    )
