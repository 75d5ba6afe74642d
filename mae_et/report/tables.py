"""The tables: what was pre-trained at what cost, the results on each data set, and the published values beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mae_et.report.compare import Comparison, Ratio, Sample, Statistic, compare, ratio, summarize
from mae_et.report.facts import recipe
from mae_et.report.join import UNTRAINED, Benchmark, Origin, choose_baseline, differing, group, has_own_seed, judges
from mae_et.report.scan import Run
from mae_et.runs.records import DENSE_KINDS, DENSE_PROBE, Accuracy, SupervisedSummary

REFERENCE = Path(__file__).with_name("reference.json")
LABELS = {
    "supervised": "supervised",
    "finetune": "fine-tuned",
    "linear_probe": "linear probe",
    "linear_sweep": "swept linear probe",
    "attentive_probe": "attentive probe",
    "knn": "kNN",
}
COCO_METRICS = {
    f"{part}_{key}": f"{part} {label}"
    for part in ("box", "mask")
    for key, label in (
        ("ap", "AP"),
        ("ap50", "AP50"),
        ("ap75", "AP75"),
        ("aps", "AP S"),
        ("apm", "AP M"),
        ("apl", "AP L"),
    )
}
AREA_METRICS = {"miou": "mIoU", "miou_ms": "mIoU, multi-scale + flip", "macc": "mAcc", "aacc": "aAcc"}
PATCH_METRICS = {
    f"{name}_{key}": f"{label} {metric}"
    for name, label in (("linear", "linear"), ("knn", "kNN"))
    for key, metric in (("miou", "mIoU"), ("boundary_iou", "Boundary IoU"), ("pixel_accuracy", "pixel accuracy"))
}
TITLES = {
    "classify": "Classification",
    "dense_probe": "Dense probe",
    "detection": "Detection",
    "segmentation": "Segmentation",
}
MAIN = {
    "top1",
    "box_ap",
    "mask_ap",
    "miou",
    "miou_ms",
    "linear_miou",
    "knn_miou",
}  # metrics with a difference to the baseline
# Columns that are shown even if nobody ran them: an empty cell says so.
ALWAYS = {*COCO_METRICS, "miou", "miou_ms", "finetune.top1", "linear_probe.top1", "knn.top1"}
PUBLISHED_SETS = {("imagenet", 50000): "ImageNet-1K", ("coco", 5000): "COCO", ("ade", 2000): "ADE20K"}

Value = Statistic | Comparison | Ratio | float | str | None


@dataclass(frozen=True)
class Column:
    """A column; numbers have `digits` decimals, 0 with thousands separators, None three significant digits."""

    key: str
    label: str
    digits: int | None = None
    help: str = ""
    is_text: bool = False


@dataclass
class Row:
    """A row: values by column key, and their origin."""

    values: dict[str, Value]
    runs: list[str] = field(default_factory=list)  # names of the records in it
    published: str = ""  # source and status of a value that the runs did not measure
    is_baseline: bool = False


@dataclass
class Table:
    """A table; `section` is glance, pretraining, transfer, other or published."""

    id: str
    title: str
    section: str
    columns: list[Column]
    rows: list[Row]
    note: str = ""


def make_tables(benchmark: Benchmark) -> list[Table]:
    """Returns all tables with a row: those of the runs, then the published ones."""
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))["tables"]
    pretraining, transfer = _pretraining(benchmark), _transfer(benchmark, reference)
    ours = [*_glance(benchmark, pretraining, transfer), pretraining, *transfer, *_others(benchmark)]
    return [table for table in ours if table.rows] + [_published(entry) for entry in reference]


# -------------------------------------------------------------------- overview


def _glance(benchmark: Benchmark, pretraining: Table, transfer: Sequence[Table]) -> list[Table]:
    """Puts cost and main results of the pre-trainings side by side; a table for each pre-training data set."""
    costs = [column for column in pretraining.columns if column.key in GLANCE]
    tables: list[Table] = []
    for same in group_rows(pretraining.rows, "data"):
        columns, rows = [Column("label", "pre-training", is_text=True), *costs], {}
        for row in same:
            rows[str(row.values["label"])] = Row(
                {key: row.values.get(key) for key in ("label", *GLANCE)}, row.runs, "", row.is_baseline
            )
        trained = list(rows)  # a result of random weights alone belongs to no pre-training data set
        for table in transfer:
            place = table.title.split(": ", 1)[-1].split(" (")[0]
            found = {str(row.values["label"]): row for row in table.rows if not row.published}
            for column in table.columns:
                if column.key.split(".")[-1] not in MAIN or not any(
                    column.key in found[label].values for label in trained if label in found
                ):
                    continue
                key = f"{table.id}.{column.key}"
                columns.append(Column(key, f"{column.label}, {place}", column.digits))
                delta = next((other for other in table.columns if other.key == f"{column.key}.delta"), None)
                columns += [Column(f"{key}.delta", delta.label, delta.digits, delta.help)] if delta else []
                for label, row in found.items():
                    if label in rows or label.startswith(UNTRAINED):
                        place_of = UNTRAINED if label.startswith(UNTRAINED) else label
                        own = rows.setdefault(place_of, Row({"label": label}))
                        own.values["label"] = min(str(own.values["label"]), label)  # run on one data set is run
                        own.values |= {
                            key: row.values.get(column.key),
                            f"{key}.delta": row.values.get(f"{column.key}.delta"),
                        }
                        own.is_baseline |= row.is_baseline
        name = same[0].values.get("data") or "data not recorded"
        table = Table(f"glance_{len(tables) + 1}", f"Pre-trained on {name}", "glance", columns, list(rows.values()))
        tables.append(_without_empty(table))
    return tables


GLANCE = ("petaflops", "seconds", "measured")  # the label says the equivalent epochs


def group_rows(rows: Sequence[Row], key: str) -> list[list[Row]]:
    """Returns the rows by a value, the largest group first."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.values.get(key), []).append(row)
    return sorted(groups.values(), key=lambda same: -sum(len(row.runs) for row in same))


# -------------------------------------------------------------------- pre-training


def _pretraining(benchmark: Benchmark) -> Table:
    columns = [
        Column("label", "pre-training", is_text=True),
        Column("model", "model", is_text=True),
        Column("target", "target", is_text=True),
        Column("data", "data", is_text=True),
        Column("seeds", "seeds", is_text=True),
        Column("equivalent_epochs", "eq. epochs", help="compute, in passes over the data at full image size, by area"),
        Column("images_seen", "images seen", 0, "images shown, repeats counted"),
        Column("fresh_images", "fresh images", 0, "images decoded; the others came from the replay buffer"),
        Column("petaflops", "PFLOP", help="counted, forward and backward"),
        Column(
            "seconds", "wall time, s", 0, "training without validation and saving; only if all had the same hardware"
        ),
        Column("gpu_hours", "GPU-hours", help="devices x wall time; empty on CPUs"),
        Column("core_hours", "core-hours", help="processes x threads x wall time; empty on GPUs"),
        Column("mfu", "MFU, %", 1, "model FLOPs utilization: counted FLOPs over the peak of the device in that time"),
        Column("device", "hardware", is_text=True),
        Column(
            "against",
            "against",
            is_text=True,
            help="the group at full size with the baseline budget of the config, else with the same budget",
        ),
        Column("nominal", "nominal x", 2, "its equivalent epochs over these"),
        Column("counted", "FLOPs x", 2, "its counted FLOPs over these"),
        Column("measured", "time x", 2, "its mean wall time over this one, ± standard error; only on equal hardware"),
        Column("own", "own x", 2, "time of the baseline budget at the run's own full-size speed, over its time"),
        Column("last_loss", "last loss", 3, "comparable only at the same data, target and bandwidth"),
        Column("knn_before", "kNN before, %", 1, "on a subset, during the run"),
        Column("knn_after", "kNN after, %", 1, "on a subset, during the run"),
        Column(
            "held_out_loss", "held-out loss", 3, "at full size after the run; comparable at the same data and target"
        ),
        Column("rankme", "RankMe", 1, "effective rank of the features of held-out images; needs no labels"),
        Column("alpha_req", "alpha-ReQ", 2, "decay of the spectrum of the same features; needs no labels"),
    ]
    shown = set(benchmark.shown)
    rows = []
    for own in benchmark.origins:
        runs = [run for run in own.runs if run in shown]
        if not runs:
            continue
        values: dict[str, Value] = {key: _same(runs, key) for key in ("model", "target", "data")}
        values |= {
            column.key: statistic(runs, column.key)
            for column in columns
            if not column.is_text and column.key not in SPEED
        }
        if hardware(runs) is None:
            values |= dict.fromkeys(("seconds", "gpu_hours", "core_hours"))
        values |= {"label": own.label, "seeds": _seeds(runs), "device": hardware(runs) or "several"}
        values |= speedup(own, benchmark.origins) | {"own": statistic(runs, "own_speedup")}
        rows.append(Row(values, [run.name for run in runs], is_baseline=own is benchmark.baseline))
    note = (
        "Mean ± standard deviation over the seeds; one seed has no deviation. The columns with x divide the cost of the group "
        'under "against" by the cost of the row: below 1, the row cost more.'
    )
    return _without_empty(Table("pretraining", "Runs and cost", "pretraining", columns, rows, note))


SPEED = {"nominal", "counted", "measured", "own"}


def speedup(own: Origin, origins: Sequence[Origin]) -> dict[str, Value]:
    """Compares a group with the one at full size that has the baseline budget of its config, else the same budget."""
    if own.is_constant or not own.runs:
        return {}
    same = [
        other
        for other in origins
        if other.is_constant
        and other.runs
        and all(other.facts.get(key) == own.facts.get(key) for key in ("data", "model", "target"))
    ]
    for wanted in (own.facts.get("baseline_equivalent_epochs"), own.facts.get("equivalent_epochs")):
        for other in same:
            if wanted is not None and other.facts.get("equivalent_epochs") == wanted:
                times = [statistic(one.runs, "seconds") for one in (other, own)]
                flops = [statistic(one.runs, "petaflops") for one in (other, own)]
                comparable = hardware(own.runs) is not None and hardware(own.runs) == hardware(other.runs)
                budget = own.facts.get("equivalent_epochs")
                return {
                    "against": other.label,
                    "nominal": wanted / budget if budget else None,
                    "counted": flops[0].mean / flops[1].mean if flops[0] and flops[1] else None,
                    "measured": ratio(times[0], times[1]) if comparable and times[0] and times[1] else None,
                }
    return {}


def hardware(runs: Sequence[Run]) -> str | None:
    """Returns the hardware of runs if it is the same for all; else None."""
    found = set()
    for run in runs:
        facts = run.facts
        if "device" not in facts:
            return None
        threads = f", {facts['num_threads']:g} threads" if facts.get("num_threads") else ""
        count = f"{facts['num_devices']} x " if facts["num_devices"] > 1 else ""
        found.add(f"{count}{facts['device']}{threads}".replace(", 1 threads", ", 1 thread"))
    return found.pop() if len(found) == 1 else None


# -------------------------------------------------------------------- transfer


def _transfer(benchmark: Benchmark, reference: list[dict[str, Any]]) -> list[Table]:
    tables: list[Table] = []
    headings = group(benchmark.results(), _heading)
    for same in sorted(headings, key=lambda same: (list(TITLES).index(_heading(same[0])[0]), -len(same))):
        task, name = _heading(same[0])
        columns, sections = [Column("label", "pre-training", is_text=True)], []
        for what, runs, key, label in _metrics(same):
            members = _by_origin(benchmark, [run for run in runs if key in run.facts])
            if members or what in ALWAYS:
                sections.append((what, members, key, label))
        rows = {own: Row({"label": own.label}) for own in _ordered(benchmark, same)}
        baseline = benchmark.baseline or choose_baseline(list(rows))
        for what, members, key, label in sections:
            columns.append(Column(what, label, 2 if task == "classify" else 1))
            base = [] if baseline is None else members.get(baseline, [])
            if key in MAIN and base and baseline is not None:
                help = f"minus {label} of {baseline.label}, with the 95% interval"
                columns.append(Column(f"{what}.delta", "Δ", 2, help))
            for own, runs in members.items():
                rows[own].values[what] = statistic(runs, key)
                if key in MAIN and own is not baseline:
                    sides = [[_sample(run, key) for run in side] for side in (runs, base)]
                    rows[own].values[f"{what}.delta"] = compare(*sides)
        for own, row in rows.items():
            row.runs = [run.name for run in same if benchmark.origin_of[run] is own]
            row.is_baseline = own is baseline
        ours = list(rows.values())
        if UNTRAINED not in {own.label for own in rows} and any(run.kind != "supervised" for run in same):
            ours.append(Row({"label": f"{UNTRAINED} (not run)"}))
        note = "Percent; mean ± standard deviation over n runs. "
        if any(column.key.endswith(".delta") for column in columns):
            note += f"Δ: difference to {baseline.label if baseline else ''}, with its 95% interval."
        rows_beside = _beside(name, task, columns, reference)
        title = f"{TITLES[task]}: {name}"
        tables.append(Table(f"transfer_{len(tables) + 1}", title, "transfer", columns, [*ours, *rows_beside], note))
    return tables


def _heading(run: Run) -> tuple[str, str]:
    """Returns what the results of one table share: the task and the images that they are measured on."""
    facts = run.facts
    counts = [
        f"{facts[key]:,.0f} {what}" for key, what in (("num_val", "images"), ("num_classes", "classes")) if key in facts
    ]
    name = facts.get("data") or "data set not recorded"
    task = run.kind if run.kind in (*DENSE_KINDS, DENSE_PROBE) else "classify"
    return task, f"{name} ({', '.join(counts)})" if counts else name


def _metrics(runs: Sequence[Run]) -> list[tuple[str, Sequence[Run], str, str]]:
    """Returns (column, runs, metric, label) for each possible column: one for each kind, recipe and metric."""
    if runs[0].kind in LABELS:
        names = {"top1": "top-1", "top5": "top-5"}
        parts = [(f"{kind}.", f"{label} ", [run for run in runs if run.kind == kind]) for kind, label in LABELS.items()]
    else:
        names = {"detection": COCO_METRICS, "segmentation": AREA_METRICS, DENSE_PROBE: PATCH_METRICS}[runs[0].kind]
        parts = [("", "", list(runs))]
    found: list[tuple[str, Sequence[Run], str, str]] = []
    for start, said, own in parts:
        # The rows of supervised trainings differ in their recipes already.
        recipes = group(own, lambda run: [] if run.kind == "supervised" else recipe(run)) or [[]]
        differences = differing([recipe(same[0]) for same in recipes if same]) or [""]
        for i, (same, more) in enumerate(zip(recipes, differences, strict=True)):
            number, more = f".{i}" if i else "", f" ({more})" if more else ""
            for key, label in names.items():
                name = f"{said.strip()}{more} {label}" if said else f"{label}{more}"
                found.append((f"{start}{key}{number}", same, key, name))
    return found


def _sample(run: Run, key: str) -> Sample:
    """Returns a result with its seeds and, of an accuracy, the half-width of the 95% interval of its images."""
    weights, half = run.weights, None
    seed = run.source.facts.get("seed") if run.source is not None else weights and weights.metadata.get("seed")
    own = run.facts.get("seed") if has_own_seed(run) else None
    if isinstance(run.summary, Accuracy | SupervisedSummary) and run.summary.top1_interval_95:
        low, high = run.summary.top1_interval_95
        half = 50 * (high - low)
    pair = None if weights is not None and seed is None else json.dumps([str(seed), own])
    return Sample(run.facts[key], pair, half)


def _by_origin(benchmark: Benchmark, runs: Sequence[Run]) -> dict[Origin, list[Run]]:
    found: dict[Origin, list[Run]] = {}
    for run in runs:
        found.setdefault(benchmark.origin_of[run], []).append(run)
    return found


def _ordered(benchmark: Benchmark, runs: Sequence[Run]) -> list[Origin]:
    present = {benchmark.origin_of[run] for run in runs}
    return [own for own in benchmark.origins if own in present]


def standard_set(name: str) -> str | None:
    """Returns the published name of a data set if both its name and its number of validation images match."""
    match = re.fullmatch(r"(\w+?)(?:[-_]?(?:1k|20k|2012|2017|challengedata2016))? \(([\d,]+) images.*\)", name.lower())
    return None if match is None else PUBLISHED_SETS.get((match[1], int(match[2].replace(",", ""))))


def _beside(name: str, task: str, columns: list[Column], reference: list[dict[str, Any]]) -> list[Row]:
    """Returns the published values that belong in the same table as those of the runs, each with its recipe."""
    known = {column.key for column in columns}
    rows = []
    for entry in reference:
        parts = _apart({label: key for label, key in entry["beside"].items() if key in known})
        if entry["data"] != standard_set(name) or entry["task"] != task:
            continue
        for values in entry["rows"]:
            row = dict(zip(entry["columns"], values, strict=True))
            for part in parts:
                what = f"{values[0]}, {next(iter(part))}" if len(parts) > 1 else values[0]
                cells: dict[str, Value] = {"label": f"{what} ({entry['title']})"}
                cells |= {key: row[label] for label, key in part.items()}
                rows.append(Row(cells, published=f"{entry['source']}: {entry['status']}"))
    return rows


def _apart(places: dict[str, str]) -> list[dict[str, str]]:
    """Splits published columns into groups, so that those with the same column of ours are in different rows."""
    parts: list[dict[str, str]] = []
    for label, key in places.items():
        part = next((part for part in parts if key not in part.values()), None)
        if part is None:
            parts.append(part := {})
        part[label] = key
    return parts


# -------------------------------------------------------------------- the rest


def _others(benchmark: Benchmark) -> list[Table]:
    runs = benchmark.of_kind("features", "reconstructions")
    columns = [
        Column(key, label, is_text=True)
        for key, label in (("name", "name"), ("kind", "what"), ("source", "pre-training"), ("data", "data"))
    ]
    rows = [
        Row(
            {
                "name": run.name,
                "kind": run.kind,
                "source": run.source.name if run.source else None,
                "data": run.facts.get("data"),
            },
            [run.name],
        )
        for run in runs
    ]
    tests = [run for run in benchmark.of_kind("detection", "segmentation") if judges(run) is not None]
    rows += [
        Row({"name": run.name, "kind": "evaluation", "source": run.source.name if run.source else None}, [run.name])
        for run in tests
    ]
    return [Table("others", "Evaluations, features, pictures", "other", columns, rows)]


def _published(entry: dict[str, Any]) -> Table:
    first, *labels = entry["columns"]
    columns = [Column("c0", first, is_text=True)]
    columns += [
        Column(f"c{i}", label, 2 if "speed-up" in label or label.startswith("mIoU") else 1)
        for i, label in enumerate(labels, 1)
    ]
    said = f"{entry['source']}: {entry['status']}"
    rows = [Row({f"c{i}": value for i, value in enumerate(values)}, published=said) for values in entry["rows"]]
    note = f"Published, not measured here. {said}. {entry['note']}".strip()
    return Table(f"published_{entry['id']}", f"{entry['data']}: {entry['title']}", "published", columns, rows, note)


def statistic(runs: Sequence[Run], key: str) -> Statistic | None:
    """Returns mean and deviation of a fact over runs."""
    return summarize([run.facts.get(key) for run in runs])


def _same(runs: Sequence[Run], key: str) -> str | None:
    values = {str(run.facts[key]) for run in runs if key in run.facts}
    return ", ".join(sorted(values)) or None


def _seeds(runs: Sequence[Run]) -> str:
    known = sorted({int(run.facts["seed"]) for run in runs if "seed" in run.facts})
    return f"{len(runs)}" + (f" ({', '.join(map(str, known))})" if known else "")


def _without_empty(table: Table) -> Table:
    """Drops the columns without any value, except the first."""
    first, *others = table.columns
    kept = [column for column in others if any(row.values.get(column.key) is not None for row in table.rows)]
    table.columns = [first, *kept]
    return table
