"""Draws curves.png and prints the tables of README.md from runs/, scores.jsonl and speed.json: `python analyse.py`."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
from scipy.stats import t

HERE = Path(__file__).parent
COLORS = {"etpp": "#1b6ca8", "constant": "#c8553d", "found": "#3a7d44"}
EQUAL_IMAGES = 11.37  # at full size as many images as `etpp` shows at 5
SCORES = {"knn": "kNN, %", "linear": "linear probe, %", "finetune": "fine-tuning, %"}


def seconds(stages: list[dict[str, Any]], speed: dict[str, float]) -> float:
    """Returns the wall time of a run at the speeds measured on a quiet core."""
    return sum(stage["num_images"] / speed[str(stage["bandwidth"])] for stage in stages)


def read() -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Returns the runs by preset and budget; each has its seed, its scores in percent, its images and its time."""
    speed = json.loads((HERE / "speed.json").read_text())["images_per_second"]
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    for line in map(json.loads, (HERE / "scores.jsonl").read_text().splitlines()):
        scores[line.pop("run")] |= line
    found = defaultdict(list)
    for folder in sorted((HERE / "runs").iterdir()):
        summary = json.loads((folder / "summary.json").read_text())
        match = re.fullmatch(r"mae_(\w+)_([\d.]+)e_s(\d)", folder.name)
        if match is None or folder.name not in scores:
            continue
        preset, budget, seed = match.groups()
        run = {name: 100 * value for name, value in scores[folder.name].items()}
        run |= {"seed": int(seed), "images": summary["num_images"], "seconds": seconds(summary["stages"], speed)}
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
    print(
        f"| run | equivalent epochs | images shown | wall time, s | seeds | {' | '.join(SCORES[name] for name in names)} |"
    )
    print("| --- | ---: | ---: | ---: | ---: |" + " ---: |" * len(names))
    for (preset, budget), runs in sorted(found.items(), key=lambda item: (-item[0][1], item[0][0])):
        cells = [spread([run[name] for run in runs if name in run]) if name in runs[0] else "" for name in names]
        print(
            f"| `{preset}` | {budget:g} | {runs[0]['images']:,} | {runs[0]['seconds']:.0f} | {len(runs)} | {' | '.join(cells)} |"
        )


def differences(found: dict[tuple[str, float], list[dict[str, Any]]]) -> None:
    """Prints differences between runs of the same seed: with `constant` at equal, half and less compute, and of the variants."""
    print("\n| difference | score | mean | by seed | 95% interval, Student's t |")
    print("| --- | --- | ---: | --- | ---: |")
    curricula = [key for key in found if key[0] in ("etpp", "found")]
    constant = [key for key in found if key[0] == "constant"]
    pairs = [(ours, full) for ours in curricula for full in constant if full[1] / 2.5 <= ours[1] <= full[1]]
    pairs += [
        (key, ("etpp", key[1])) for key in found if key[0] not in ("etpp", "constant") and ("etpp", key[1]) in found
    ]
    pairs += [(("etpp", 5.0), key) for key in constant if key[1] == EQUAL_IMAGES]
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
    """Draws each score over compute and over wall time; points are seeds, lines join the means."""
    names = measured(found)
    figure, axes = plt.subplots(2, len(names), figsize=(4 * len(names), 6.4), sharey="col", squeeze=False)
    for column, name in enumerate(names):
        for preset, color in COLORS.items():
            own = sorted((budget, runs) for (kind, budget), runs in found.items() if kind == preset and name in runs[0])
            for row in range(2):
                xs = [budget if row == 0 else runs[0]["seconds"] for budget, runs in own]
                for x, (_, runs) in zip(xs, own, strict=True):
                    axes[row, column].plot([x] * len(runs), [run[name] for run in runs], ".", color=color, alpha=0.6)
                means = [mean(run[name] for run in runs) for _, runs in own]
                axes[row, column].plot(xs, means, "o-", color=color, label=preset, markersize=4)
                axes[row, column].set_xlabel("compute, equivalent epochs" if row == 0 else "wall time on one core, s")
                axes[row, column].set_ylabel(SCORES[name])
                axes[row, column].grid(alpha=0.3)
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", dpi=110)


if __name__ == "__main__":
    runs = read()
    table(runs)
    differences(runs)
    draw(runs)
