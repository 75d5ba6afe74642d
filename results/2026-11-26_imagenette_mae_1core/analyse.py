"""Draws curves.png and prints the tables of a record: `python analyse.py [RECORD]`, by default the one of this file.

A record has runs/, scores.jsonl and, where speeds were measured on a quiet machine, speed.json.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
from scipy.stats import t

RECORD = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
COLORS = {"etpp": "#1b6ca8", "constant": "#c8553d", "found": "#3a7d44"}
EQUAL_IMAGES = 11.37  # at full size as many images as `etpp` shows at 5
VARIANTS = ("bicubic", "lanczos", "mask50", "warmup0", "warmup10", "cropscale")
SCORES = {"knn": "kNN, %", "linear": "linear probe, %", "finetune": "fine-tuning, %"}


def seconds(stages: list[dict[str, Any]], speed: dict[str, float]) -> float:
    """Returns the wall time of a run at the speeds measured on a quiet core."""
    return sum(stage["num_images"] / speed[str(stage["bandwidth"])] for stage in stages)


def read() -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Returns the runs by preset and budget; each has its seed, its scores in percent, its images and its time."""
    speeds = RECORD / "speed.json"
    speed = json.loads(speeds.read_text())["images_per_second"] if speeds.exists() else None
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    for line in map(json.loads, (RECORD / "scores.jsonl").read_text().splitlines()):
        scores[line.pop("run")] |= line
    found = defaultdict(list)
    for folder in sorted((RECORD / "runs").iterdir()):
        summary = json.loads((folder / "summary.json").read_text())
        match = re.fullmatch(r"mae_(\w+)_([\d.]+)e_s(\d)", folder.name)
        if match is None or folder.name not in scores:
            continue
        preset, budget, seed = match.groups()
        run = {name: 100 * value for name, value in scores[folder.name].items()}
        run |= {"seed": int(seed), "images": summary["num_images"]}
        if speed is not None:
            run["seconds"] = seconds(summary["stages"], speed)
        found[preset, float(budget)].append(run)
    return found


def measured(found: dict[tuple[str, float], list[dict[str, Any]]]) -> list[str]:
    """Returns the scores that a run has."""
    return [name for name in SCORES if any(name in run for runs in found.values() for run in runs)]


def spread(values: list[float]) -> str:
    """Returns the mean and the standard deviation over seeds."""
    return f"{mean(values):.1f}" + (f" +- {stdev(values):.1f}" if len(values) > 1 else "")


def table(found: dict[tuple[str, float], list[dict[str, Any]]]) -> None:
    """Prints a row for each preset and budget."""
    names = measured(found)
    timed = any("seconds" in run for runs in found.values() for run in runs)
    heads = ["run", "equivalent epochs", "images shown", *["wall time, s"] * timed, "seeds"]
    print(f"| {' | '.join(heads + [SCORES[name] for name in names])} |")
    print("| --- |" + " ---: |" * (len(heads) - 1 + len(names)))
    for (preset, budget), runs in sorted(found.items(), key=lambda item: (-item[0][1], item[0][0])):
        cells = [f"`{preset}`", f"{budget:g}", f"{runs[0]['images']:,}"]
        if timed:
            cells.append(f"{runs[0]['seconds']:.0f}")
        cells.append(str(len(runs)))
        values = [[run[name] for run in runs if name in run] for name in names]
        print(f"| {' | '.join(cells + [spread(row) if row else '' for row in values])} |")


def differences(found: dict[tuple[str, float], list[dict[str, Any]]]) -> None:
    """Prints differences between runs of the same seed: with `constant` at equal, half and less compute, and of the variants."""
    print("\n| difference | score | mean | by seed | 95% interval, Student's t |")
    print("| --- | --- | ---: | --- | ---: |")
    curricula = [key for key in found if key[0].split("_")[-1] in ("etpp", "found")]
    constant = [key for key in found if key[0].split("_")[-1] == "constant"]
    pairs = [
        (ours, full)
        for ours in curricula
        for full in constant
        if ours[0].split("_")[:-1] == full[0].split("_")[:-1] and full[1] / 2.5 <= ours[1] <= full[1]
    ]
    pairs += [(key, ("etpp", key[1])) for key in found if key[0] in ("found", *VARIANTS) and ("etpp", key[1]) in found]
    pairs += [(("etpp", 5.0), key) for key in constant if key == ("constant", EQUAL_IMAGES)]
    for ours, theirs in sorted(set(pairs), key=lambda pair: (pair[0][0], -pair[1][1], -pair[0][1])):
        one, other = ({run["seed"]: run for run in found[key]} for key in (ours, theirs))
        for name in SCORES:
            both = [s for s in one if s in other and name in one[s] and name in other[s]]
            if not both:
                continue
            gaps = [one[s][name] - other[s][name] for s in both]
            error = ""
            if len(gaps) > 1:
                error = f"+- {float(t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / len(gaps) ** 0.5:.1f}"
            print(
                f"| `{ours[0]}` at {ours[1]:g} - `{theirs[0]}` at {theirs[1]:g} | {SCORES[name].split(',')[0]} | "
                f"{mean(gaps):+.1f} | {', '.join(f'{gap:+.1f}' for gap in gaps)} | {error} |"
            )


def draw(found: dict[tuple[str, float], list[dict[str, Any]]]) -> None:
    """Draws each score over compute and, where speeds are known, over wall time; points are seeds, lines join the means."""
    names = measured(found)
    axis_names = {"compute": "compute, equivalent epochs"}
    if any("seconds" in runs[0] for runs in found.values()):
        axis_names["seconds"] = "wall time on one core, s"
    rows = len(axis_names)
    figure, axes = plt.subplots(rows, len(names), figsize=(4 * len(names), 3.2 * rows), sharey="col", squeeze=False)
    for column, name in enumerate(names):
        for preset, color in COLORS.items():
            own = sorted((budget, runs) for (kind, budget), runs in found.items() if kind == preset and name in runs[0])
            for row, (quantity, label) in enumerate(axis_names.items()):
                xs = [budget if quantity == "compute" else runs[0]["seconds"] for budget, runs in own]
                for x, (_, runs) in zip(xs, own, strict=True):
                    axes[row, column].plot([x] * len(runs), [run[name] for run in runs], ".", color=color, alpha=0.6)
                means = [mean(run[name] for run in runs) for _, runs in own]
                axes[row, column].plot(xs, means, "o-", color=color, label=preset, markersize=4)
                axes[row, column].set_xlabel(label)
                axes[row, column].set_ylabel(SCORES[name])
                axes[row, column].grid(alpha=0.3)
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(RECORD / "curves.png", dpi=110)


if __name__ == "__main__":
    runs = read()
    table(runs)
    differences(runs)
    draw(runs)
