"""Draws curves.png and prints the table of README.md from runs/: `python analyse.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
NETWORKS = {"resnet": "ResNet", "vit": "ViT", "convnext": "ConvNeXt"}
COLORS = {"etpp": "#1b6ca8", "constant": "#c8553d"}
BUDGETS = {"8e": ("8 equivalent epochs", "-"), "5.33e": ("5.33 equivalent epochs", "--")}


def read(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the summary of a run and its log lines with an accuracy."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run / "summary.json").read_text()), lines


def curve(lines: list[dict[str, Any]], axis: str) -> tuple[list[float], list[float]]:
    """Returns the accuracies in percent over a logged quantity; an accuracy is logged after the line of its step."""
    xs, ys, last = [], [], 0.0
    for line in lines:
        last = line.get(axis, last)
        if "val/top1" in line:
            xs.append(last)
            ys.append(100 * line["val/top1"])
    return xs, ys


def main() -> None:
    """Draws the figure and prints a row for each run."""
    figure, axes = plt.subplots(2, len(NETWORKS), figsize=(11, 6.4), sharey="col", constrained_layout=True)
    print(
        "| network | run | images shown | training TFLOP | wall time, s | waiting for data | top-1, % | 95% interval |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for column, (network, title) in enumerate(NETWORKS.items()):
        for budget, (said, dash) in BUDGETS.items():
            for preset, color in COLORS.items():
                run = HERE / "runs" / f"{network}_{preset}_{budget}_s0"
                if not run.is_dir():
                    continue
                summary, lines = read(run)
                low, high = (100 * value for value in summary["top1_interval_95"])
                print(
                    f"| {title} | `{preset}`, {said} | {summary['num_images']:,} | {1e3 * summary['train_petaflops']:.1f} | "
                    f"{summary['seconds']:.0f} | {summary['waiting_fraction']:.0%} | {100 * summary['top1']:.1f} | "
                    f"{low:.1f} to {high:.1f} |"
                )
                for row, (axis, label) in enumerate(
                    (("equivalent_epochs", "equivalent epochs"), ("seconds", "wall time, s"))
                ):
                    axes[row, column].plot(
                        *curve(lines, axis), dash, color=color, marker="o", markersize=3, label=f"{preset}, {said}"
                    )
                    axes[row, column].set_xlabel(label)
                    axes[row, column].grid(alpha=0.25)
        axes[0, column].set_title(title)
    for row in axes:
        row[0].set_ylabel("top-1 at 112 px, %")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    figure.savefig(HERE / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
