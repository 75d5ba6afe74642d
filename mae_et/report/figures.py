"""Draws the figures and keeps the numbers behind them. Names of runs stand in the legend, which the page escapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mae_et.report.compare import Statistic
from mae_et.report.drawing import INK, MARKERS, Series, color_of, draw
from mae_et.report.join import UNTRAINED, Benchmark, Origin
from mae_et.report.scan import FINISHED, RUNNING, UNFINISHED, Run
from mae_et.report.tables import Table, statistic
from mae_et.runs.records import BACKBONE_KINDS

MAX_POINTS = 300  # of each line


@dataclass
class Figure:
    """A figure, as an SVG for each choice of axis, and the numbers that it shows."""

    id: str
    title: str
    variants: list[tuple[str, str]]  # label, SVG
    legend: list[Series]
    header: list[str]
    rows: list[list[Any]]
    note: str = ""


Line = tuple[Series, Sequence[float], Sequence[float]]


def make_figures(benchmark: Benchmark, tables: Sequence[Table]) -> list[Figure]:
    """Returns the figures that have data, in the order of the page."""
    series = {
        own: Series(i, own.label) for i, own in enumerate(own for own in benchmark.origins if own.label != UNTRAINED)
    }
    figures = [*_results(benchmark, tables, series), *_curves(benchmark, series), *_curricula(benchmark, series)]
    published = [table for table in tables if table.id == "published_mae_pretraining"]
    return [*figures, *(_published(table) for table in published)]


# -------------------------------------------------------------------- accuracy against cost


def _results(benchmark: Benchmark, tables: Sequence[Table], series: dict[Origin, Series]) -> Iterable[Figure]:
    """Draws each main metric over the cost of pre-training: a point for each group, bars of one standard deviation."""
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
                        (
                            unit,
                            _draw_results(f"{table.id}-{column.key}-{key}", drawn, series, unit, column.label, floor),
                        )
                    )
                rows += [[own.label, key, cost.mean, cost.sd, stat.mean, stat.sd, stat.n] for own, cost, stat in placed]
            if variants:
                note = "Bars: one standard deviation over the runs." + (" Dashed: random weights." if floor else "")
                yield Figure(
                    f"results_{table.id}_{column.key}".replace(".", "_"),
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
    """Returns small compute in TFLOP and long times in hours, else the points as they are."""
    largest = max(cost.mean for _, cost, _ in points)
    for word, unit, is_due, factor in (
        ("PFLOP", "TFLOP", largest < 0.1, 1000.0),
        (", s", ", h", largest > 7200, 1 / 3600),
    ):
        if label.endswith(word) and is_due:
            return [
                (own, Statistic(cost.mean * factor, None if cost.sd is None else cost.sd * factor, cost.n), stat)
                for own, cost, stat in points
            ], label.removesuffix(word) + unit
    return points, label


def _draw_results(
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
    """Draws loss and kNN accuracy of the pre-trainings; other data or targets get a figure of their own."""
    runs = [*benchmark.shown, *benchmark.running, *benchmark.problems]
    found = [run for run in runs if run.kind in BACKBONE_KINDS and run.status in (FINISHED, RUNNING, UNFINISHED)]
    partial_runs = [run for run in found if run.status != FINISHED]
    extra = {run: Series(len(series) + i, f"{run.name} ({run.status})") for i, run in enumerate(partial_runs)}
    for name, what, title, keys in (
        ("loss", "loss", "Loss", ("data", "target")),
        ("knn", "knn/top1", "kNN accuracy, %", ("data",)),
        ("val", "val/top1", "Top-1 accuracy, %", ("data",)),
        ("heldout", "val/loss", "Held-out loss", ("data", "target")),
        ("rankme", "val/rankme", "RankMe", ("data",)),
        ("alpha", "val/alpha_req", "alpha-ReQ", ("data",)),
    ):
        groups: dict[tuple[str, ...], list[Run]] = {}
        for run in found:
            if name == "heldout" and run.kind != "pretrain":
                continue
            if run.metrics[what].notna().any():
                groups.setdefault(tuple(str(run.facts.get(key, "not recorded")) for key in keys), []).append(run)
        for i, (said, members) in enumerate(groups.items()):
            lines = [(run, extra.get(run) or series[benchmark.origin_of[run]], curve(run, what)) for run in members]
            stage = "training" if any(run.kind == "supervised" for run in members) else "pre-training"
            yield _curve_figure(name, i, f"{title} during {stage}: {', '.join(said)}", title, lines)


def _curve_figure(name: str, i: int, title: str, ylabel: str, lines: list[tuple[Run, Series, np.ndarray]]) -> Figure:
    """Returns the figure of one quantity; `lines` holds points as from `curve`."""
    thinned = [(run, one, thin(points)) for run, one, points in lines]
    variants = []
    for axis, label in ((0, "equivalent epochs"), (1, "wall time, s")):
        drawn: list[Line] = [(one, points[:, axis].tolist(), points[:, 2].tolist()) for _, one, points in thinned]
        settle = _cut_top(drawn) if name == "loss" else None
        variants.append((label, draw_lines(f"{name}{i}-{axis}", drawn, label, ylabel, settle, marker=name != "loss")))
    note = {
        "loss": "One line per run. A smaller bandwidth gives smoother images and another loss: a jump between stages is not "
        "a jump in quality. The first points may lie above the frame.",
        "knn": "One line per run, on a subset of the images (run.knn_max_images), always at full image size.",
        "val": "One line per run, on all validation images, always at full image size.",
        **dict.fromkeys(
            ("heldout", "rankme", "alpha"),
            "One line per run, on held-out images at full image size, without labels (run.label_free_interval).",
        ),
    }[name]
    num_logged = max(len(points) for _, _, points in lines)
    if num_logged > MAX_POINTS:
        note += f" Up to {num_logged:,} logged points: figure and CSV show {MAX_POINTS} means of consecutive points per run."
    return Figure(
        f"{name}_{i + 1}",
        title,
        variants,
        list({one.index: one for _, one, _ in lines}.values()),
        ["run", "equivalent epochs", "seconds", name],
        [[run.name, *point] for run, _, points in thinned for point in points.tolist()],
        note,
    )


def curve(run: Run, key: str) -> np.ndarray:
    """Returns a logged quantity over the progress of the run; where a line logs no progress, it is interpolated.

    Returns:
        [num_points, 3]: equivalent epochs, seconds, value; percent for accuracies.
    """
    logged = run.metrics.dropna(subset=["step"])
    logged = logged.sort_values("step", kind="stable")
    places = logged.dropna(subset=["equivalent_epochs", "seconds"]).drop_duplicates("step", keep="last")
    points = logged.dropna(subset=[key])
    steps, known = points["step"].to_numpy(), np.concatenate([[0.0], places["step"].to_numpy()])
    axes = [
        np.interp(steps, known, np.concatenate([[0.0], places[name].to_numpy()]))
        for name in ("equivalent_epochs", "seconds")
    ]
    return np.stack([*axes, points[key].to_numpy() * (100 if key.endswith("top1") else 1)], axis=1)


def thin(points: np.ndarray) -> np.ndarray:
    """Returns at most MAX_POINTS rows: the means of consecutive rows, the first and the last row as they are."""
    if len(points) <= MAX_POINTS:
        return points
    starts = np.linspace(1, len(points) - 1, MAX_POINTS - 1).astype(int)[:-1]
    counts = np.diff(np.append(starts, len(points) - 1))
    means = np.add.reduceat(points[:-1], starts, axis=0) / counts[:, None]
    return np.concatenate([points[:1], means, points[-1:]])


def draw_lines(
    salt: str,
    lines: list[Line],
    xlabel: str,
    ylabel: str,
    settle: Callable[[Axes], None] | None = None,
    marker: bool = False,
    steps: bool = False,
) -> str:
    def paint(axes: Axes) -> None:
        for i, (one, x, y) in enumerate(lines):
            axes.plot(
                x,
                y,
                color=color_of(one),
                linestyle=one.dash,
                gid=f"{salt}-{i}-{one.index}",
                marker=MARKERS[one.index % len(MARKERS)] if marker else None,
                markersize=3.5,
                drawstyle="steps-post" if steps else "default",
                linewidth=1.6 + (2.4 * (len(lines) - 1 - i) / len(lines) if steps else 0),  # hidden lines show as a rim
            )
        axes.margins(y=0.08)
        axes.set_xlim(left=0)
        if settle is not None:
            settle(axes)
        axes.xaxis.set_major_locator(MaxNLocator(6))

    return draw(salt, paint, xlabel, ylabel)


def _cut_top(lines: Sequence[Line]) -> Callable[[Axes], None]:
    """Returns a function that limits the y axis to the range after the first twentieth of each run, if that is much smaller."""
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
        for run in [run for run in own.runs if run in shown][:1]:  # all seeds have the same plan
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
                svg = draw_lines(f"curriculum{i}-{key}", lines, "compute done, %", label, settle, steps=key != "lr")
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
    """Returns the compute fraction at which each bandwidth starts, with 1 at the end, and the bandwidths."""
    stages = run.plan.stages if run.plan is not None else getattr(run.summary, "stages", [])
    costs = [stage.size[0] * stage.size[1] * stage.num_images for stage in stages]
    if not costs:
        return [], []
    x = np.concatenate([[0.0], np.cumsum(costs)]) / (sum(costs) or 1)
    return x.tolist(), [float(stage.bandwidth) for stage in [*stages, stages[-1]]]


def _logged(run: Run, key: str) -> tuple[list[float], list[float]]:
    points = thin(run.metrics[["compute_fraction", key]].dropna().to_numpy())
    return points[:, 0].tolist(), points[:, 1].tolist()


# -------------------------------------------------------------------- published values


def _published(table: Table) -> Figure:
    """Draws the published accuracies over the cost that follows from the published speed-ups, with hollow markers."""
    points = [
        (str(row.values["c0"]), 1600 / float(row.values["c2"]), float(row.values["c1"]))  # type: ignore[arg-type]
        for row in table.rows
    ]

    def paint(axes: Axes) -> None:
        for y in {y for _, _, y in points}:
            level = sorted((x, name) for name, x, own in points if own == y)
            up = round(10 * y) % 2 == 1 or y < 83.3
            for i, (x, name) in enumerate(level):
                lifted = i + 1 < len(level) and level[i + 1][0] - x < 200  # its label goes above that of the neighbour
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
        f"Not measured here: {table.rows[0].published}.",
    )
