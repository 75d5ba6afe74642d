"""Draws a curriculum search: the tree of its decisions with scores, or the scores of the trials of a Bayesian search."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mae_et.runs.search import TREE, SearchRecord, TrialRecord
from mae_et.storage.atomic import atomic_path

INK, CHOSEN, OTHER = "#1b1f24", "#0072b2", "#8a97a6"


def axis_labels(record: SearchRecord) -> tuple[str, str]:
    """Returns the labels of both axes."""
    score = f"score ({record.settings.score})"
    return ("trial", score) if record.settings.algorithm == "bayesian" else ("stage", "bandwidth, px")


def paint(
    axes: Axes,
    record: SearchRecord,
    trials: Sequence[TrialRecord],
    ink: str = INK,
    chosen: str = CHOSEN,
    other: str = OTHER,
) -> None:
    """Draws a search into axes.

    Args:
        axes: to draw into.
        record: of a search that is done.
        trials: of the search.
        ink, chosen, other: colours of text, of what was chosen, and of the rest.
    """
    if record.settings.algorithm == "bayesian":
        _paint_trials(axes, record, trials, chosen, other)
    else:
        _paint_tree(axes, record, ink, chosen, other)


def write_tree(folder: Path, record: SearchRecord, trials: Sequence[TrialRecord]) -> None:
    """Writes tree.png into the folder of a search."""
    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    paint(axes, record, trials)
    xlabel, ylabel = axis_labels(record)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    with atomic_path(folder / TREE) as temporary:
        canvas.print_png(temporary)


def _paint_tree(axes: Axes, record: SearchRecord, ink: str, chosen: str, other: str) -> None:
    """Draws a node for each candidate that was tried, labelled with its mean score, and the path of the choices."""
    found = record.found
    assert found is not None
    path = [row.bandwidth for row in found.stages]
    stages = range(1, len(path) + 1)
    if record.settings.algorithm == "sequential":
        for decision in found.decisions[1:]:
            before = path[decision.stage - 2]
            for band in decision.scores:
                axes.plot([decision.stage - 1, decision.stage], [before, band], color=other, linewidth=0.8, zorder=1)
    axes.plot(stages, path, color=chosen, linewidth=2.4, zorder=2)
    for decision in found.decisions:
        for band, scores in decision.scores.items():
            is_chosen = band == decision.chosen
            axes.plot([decision.stage], [band], "o", color=chosen if is_chosen else other, markersize=6, zorder=3)
            axes.annotate(
                f"{statistics.fmean(scores):.4g}",
                (decision.stage, band),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=ink,
                fontweight="bold" if is_chosen else "normal",
            )
    score = "" if found.score is None else f"{found.score:.4g}"
    axes.plot([len(path)], [path[-1]], "o", color=chosen, markersize=6, zorder=3)
    axes.annotate(
        score, (len(path), path[-1]), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8, color=ink
    )
    bands = sorted({*path, *(band for decision in found.decisions for band in decision.scores)})
    axes.set_xticks(list(stages))
    axes.set_yticks(bands, [str(band) for band in bands])
    axes.set_xlim(0.6, len(path) + 0.4)
    room = max(2, (bands[-1] - bands[0]) // 10)
    axes.set_ylim(bands[0] - room, bands[-1] + room)


def _paint_trials(axes: Axes, record: SearchRecord, trials: Sequence[TrialRecord], chosen: str, other: str) -> None:
    """Draws the score of each trial over its number; a cross was pruned, the line is the mean at full size."""
    found = record.found
    assert found is not None
    reference = [trial.score for trial in trials if trial.name.startswith("full-size")]
    if reference:
        axes.axhline(statistics.fmean(reference), color=other, linestyle="--", linewidth=1)
    for trial in trials:
        if trial.name.startswith("trial-"):
            number = int(re.sub(r"\D.*", "", trial.name.removeprefix("trial-")) or 0)
            color = chosen if trial.name in found.trials else other
            marker = "x" if trial.status == "pruned" else "o"
            axes.plot([number], [trial.score], marker, color=color, markersize=6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
