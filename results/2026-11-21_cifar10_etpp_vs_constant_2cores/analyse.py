"""Makes table.md, raw.json and curves.png from the folders that run.sh wrote: `python analyse.py OUT`."""

import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

here, out = Path(__file__).parent, Path(sys.argv[1])
STYLE = {"constant": ("#D55E00", "o"), "etpp": ("#0072B2", "s")}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def curve(folder: Path) -> list[dict]:
    """The kNN accuracies during the run, with the equivalent epochs and seconds at which they were taken."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [(0, 0.0, 0.0)] + [(x["step"], x["equivalent_epochs"], x["seconds"]) for x in lines if "loss" in x]
    points = []
    for line in lines:
        if "knn/top1" not in line:
            continue
        before = max(x for x in logged if x[0] <= line["step"])
        after = min((x for x in logged if x[0] >= line["step"]), default=before)
        share = 0 if after[0] == before[0] else (line["step"] - before[0]) / (after[0] - before[0])
        epochs, seconds = (b + share * (a - b) for b, a in zip(before[1:], after[1:], strict=True))
        points.append({"equivalent_epochs": epochs, "seconds": seconds, "knn": line["knn/top1"]})
    return points


runs = defaultdict(list)
for folder in sorted(out.iterdir()):
    match = re.fullmatch(r"(constant|etpp)_([\d.]+)e_seed(\d)", folder.name)
    if not match or not (folder / "summary.json").exists():
        continue
    summary = read(folder / "summary.json")
    run = {
        "seed": int(match[3]),
        "seconds": summary["seconds"],
        "petaflops": summary["train_petaflops"],
        "num_images": summary["num_images"],
        "loss": summary["last_loss"],
        "stages": summary["stages"],
        "curve": curve(folder),
    }
    for protocol in ("knn", "linear"):
        judged = out / f"{folder.name}_{protocol}" / "summary.json"
        run[protocol] = read(judged)["top1"] if judged.exists() else None
    runs[match[1], float(match[2])].append(run)

raw = {f"{name} {epochs:g}": value for (name, epochs), value in sorted(runs.items())}
(here / "raw.json").write_text(json.dumps(raw, indent=1) + "\n")


def spread(values: list, scale: float = 1.0, digits: int = 1) -> str:
    values = [scale * v for v in values if v is not None]
    if not values:
        return ""
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


titles = ["curriculum", "equivalent epochs", "seeds", "kNN top-1 (%)", "linear probe top-1 (%)", "images shown"]
titles += ["PFLOP counted", "wall time (s, shared cores)"]
rows = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
for (name, epochs), group in sorted(runs.items()):
    rows.append(
        f"| {name} | {epochs:g} | {len(group)} | {spread([r['knn'] for r in group], 100)} | "
        f"{spread([r['linear'] for r in group], 100)} | {group[0]['num_images']:,} | "
        f"{spread([r['petaflops'] for r in group[:1]], 1, 4)} | {spread([r['seconds'] for r in group], 1, 0)} |"
    )
(here / "table.md").write_text("\n".join(rows) + "\n")
print("\n".join(rows))

figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
for (name, epochs), group in sorted(runs.items()):
    color, marker = STYLE[name]
    dashed = epochs != max(e for n, e in runs if n == name)
    for axis, key in zip(axes, ("equivalent_epochs", "seconds"), strict=True):
        for i, run in enumerate(group):
            axis.plot(
                [p[key] for p in run["curve"]],
                [100 * p["knn"] for p in run["curve"]],
                color=color,
                marker=marker,
                markersize=3,
                linewidth=1,
                linestyle="--" if dashed else "-",
                alpha=0.75,
                label=f"{name}, {epochs:g} equivalent epochs" if i == 0 else None,
            )
axes[0].set_xlabel("equivalent epochs (compute by area)")
axes[1].set_xlabel("training seconds (two runs at a time on two shared cores)")
axes[0].set_ylabel("kNN top-1 (%), 3000 training and 3000 test images")
axes[0].legend(fontsize=8)
for axis in axes:
    axis.grid(alpha=0.3)
figure.suptitle("CIFAR-10, small MAE: EfficientTrain++ curriculum against full size, each line one seed")
figure.savefig(here / "curves.png", dpi=130)
