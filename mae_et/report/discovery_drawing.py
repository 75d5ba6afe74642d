"""Draws curves of a discovery study as PNG files that stand alone, with the numbers as CSV beside each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, NullFormatter

from mae_et.report.discovery import Curve
from mae_et.report.drawing import FAINT, INK, PALETTE
from mae_et.report.text import csv_text
from mae_et.storage.atomic import atomic_path

BASELINE_STYLE = {"color": INK, "linewidth": 2.2}
WIDTH, HEIGHT, DPI = 6.0, 4.4, 150  # inches of one panel


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn. `mark` is the compute fraction of a separation point; a marker shows it."""

    curve: Curve
    style: dict[str, Any]
    mark: float | None = None
    note: str = ""  # after the label in the legend


@dataclass(frozen=True)
class Panel:
    """Axes with lines. Values are multiplied by `scale` when they are drawn and written."""

    lines: list[Line]
    title: str
    ylabel: str
    scale: float = 1.0
    xlabel: str = "compute done, %"
    x_scale: float = 100.0
    log_x: bool = False
    level: float | None = None  # a horizontal line
    top: float | None = None  # largest and smallest limit of the y axis
    bottom: float | None = None
    error_bars: bool = False  # instead of bands of one standard error


@dataclass(frozen=True)
class Drawing:
    """A figure of one or two panels, as it is written."""

    name: str
    alt: str  # what it shows, in words
    panels: list[Panel]
    facts: list[list[Any]] = field(default_factory=list)  # further rows of the CSV: what, line, value


def shades(num: int) -> list[str]:
    """Returns distinct colours from dark blue to yellow-green, for lines that have an order."""
    colormap = matplotlib.colormaps["viridis"]
    return [matplotlib.colors.to_hex(colormap(0.1 + 0.78 * i / max(1, num - 1))) for i in range(num)]


def color(i: int) -> str:
    return PALETTE[i % len(PALETTE)][0]


def write_drawing(drawing: Drawing, folder: Path) -> None:
    """Writes NAME.png and NAME.csv."""
    rows = [
        [
            panel.title,
            panel.xlabel,
            line.curve.label,
            panel.x_scale * x,
            panel.scale * y,
            panel.scale * e if np.isfinite(e) else None,
        ]
        for panel in drawing.panels
        for line in panel.lines
        for x, y, e in zip(line.curve.compute, line.curve.mean, line.curve.error, strict=True)
    ]
    rows += [[what, None, name, None, value, None] for what, name, value in drawing.facts]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / f"{drawing.name}.csv") as temporary:
        header = ["panel", "x axis", "line", "x", "value", "standard error"]
        temporary.write_text(csv_text(header, rows), encoding="utf-8")
    save(drawing.name, folder, [partial(_paint, panel) for panel in drawing.panels])


def save(name: str, folder: Path, painters: Sequence[Callable[[Axes], None]]) -> None:
    """Writes a PNG file with one pair of axes for each painter."""
    settings = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
    }
    with matplotlib.rc_context(settings):
        canvas = Canvas(figsize=(WIDTH * len(painters), HEIGHT), dpi=DPI, layout="constrained")
        axes = canvas.subplots(1, len(painters), squeeze=False)[0]
        for own, paint in zip(axes, painters, strict=True):
            own.grid(True, color=FAINT, linewidth=0.6)
            own.set_axisbelow(True)
            paint(own)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / f"{name}.png") as temporary:
            canvas.savefig(temporary, format="png", metadata={"Software": None})


def _paint(panel: Panel, axes: Axes) -> None:
    for i, line in enumerate(panel.lines):
        curve = line.curve
        keep = curve.compute > 0 if panel.log_x else np.ones(len(curve.compute), dtype=bool)
        x, y, error = (
            panel.x_scale * curve.compute[keep],
            panel.scale * curve.mean[keep],
            panel.scale * curve.error[keep],
        )
        axes.plot(
            x,
            y,
            label=f"{curve.label}{line.note}",
            **{"linewidth": 1.6, "marker": "o", "markersize": 2.8, **line.style},
        )
        if panel.error_bars:  # beside each other, because many have the same place
            shift = (i - (len(panel.lines) - 1) / 2) * 0.008 * (x.max() - x.min() or 1)
            axes.lines[-1].set_xdata(x + shift)
            axes.errorbar(x + shift, y, error, fmt="none", ecolor=line.style["color"], elinewidth=1, capsize=3)
        elif np.isfinite(error).all():
            axes.fill_between(x, y - error, y + error, color=line.style["color"], alpha=0.13, linewidth=0)
        if line.mark is not None:
            at = panel.scale * float(np.interp(line.mark, curve.compute, curve.mean))
            axes.axvline(100 * line.mark, color=line.style["color"], linewidth=1, linestyle=":")
            axes.plot(
                [100 * line.mark], [at], "D", color=line.style["color"], markersize=7, markeredgecolor="white", zorder=5
            )
    if panel.level is not None:
        axes.axhline(panel.level, color=INK, linewidth=0.9, linestyle="--", alpha=0.6)
    if panel.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif panel.x_scale == 100:
        axes.set_xlim(-1.5, 101.5)
    if panel.top is not None and axes.get_ylim()[1] > panel.top:
        axes.set_ylim(top=panel.top)
    if panel.bottom is not None and axes.get_ylim()[0] < panel.bottom:
        axes.set_ylim(bottom=panel.bottom)
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9, frameon=False)
