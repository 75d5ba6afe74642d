"""Draws docs/explanation/rooms.svg from the table of allowed imports: `python docs/explanation/rooms.py`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Set
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = {"mae_et", "process", "cli", "__main__"}  # front-row files that start tools
PURPOSE = {
    "errors": "errors with a fix",
    "lowfreq": "low-frequency crop",
    "frequency": "filters, power by band",
    "models": "networks",
    "config": "what was asked",
    "curriculum": "what it means: the plan",
    "storage": "checkpoints, weights",
    "data": "sources, stream, replay",
    "engine": "the loop",
    "evaluation": "accuracies, pictures",
    "runs": "run folder, records",
    "tasks": "pre-train, probe, ...",
    "report": "the page",
    "api": "Python interface",
    "commands": "subcommands of mae-et",
    "downstream": "mmdetection, mmsegmentation",
    "tools": "scripts",
}


def levels(may_import: Mapping[str, Set[str]]) -> list[list[str]]:
    """Returns the rooms by level, lowest first: a room is one level above the highest room that it may import."""
    height: dict[str, int] = {}
    for room, below in may_import.items():
        if room not in LEFT_OUT:
            height[room] = 1 + max((height[other] for other in below if other in height), default=-1)
    rows: list[list[str]] = [[] for _ in range(max(height.values()) + 1)]
    for room, level in height.items():
        rows[level].append(room)
    return rows


def draw(rows: list[list[str]], path: Path) -> None:
    """Writes the picture; the same rows give the same bytes."""
    plt.rcParams.update({"svg.hashsalt": "rooms", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(7, 0.62 * len(rows)))
    for level, rooms in enumerate(rows):
        for index, room in enumerate(rooms):
            x, y = 4.4 * (index - (len(rooms) - 1) / 2), level
            box = {"boxstyle": "round,pad=0.45", "facecolor": "#eef3f8", "edgecolor": "#47617d"}
            axes.text(x, y, f"{room}: {PURPOSE.get(room, '')}", ha="center", va="center", fontsize=9, bbox=box)
        if level:
            arrow = {"arrowstyle": "-|>", "color": "#8a97a6"}
            axes.annotate("", (0, level - 0.72), (0, level - 0.28), arrowprops=arrow)
    axes.set(xlim=(-4.6, 4.6), ylim=(-0.5, len(rows) - 0.5))
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main(path: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.unit.test_layers import MAY_IMPORT

    draw([*levels(MAY_IMPORT), ["downstream"], ["tools"]], path)


if __name__ == "__main__":
    main(Path(__file__).with_name("rooms.svg"))
