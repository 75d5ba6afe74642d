"""Writes the report: one HTML page without external files, Markdown, JSON and CSV."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from PIL import Image

import mae_et
from mae_et.report.band_figures import band_figures
from mae_et.report.compare import Comparison, Ratio, Statistic
from mae_et.report.drawing import PALETTE, standalone
from mae_et.report.facts import FACTS, fact
from mae_et.report.figures import Figure, make_figures
from mae_et.report.join import Benchmark
from mae_et.report.scan import Run
from mae_et.report.searches import HEADER
from mae_et.report.tables import Column, Row, Table, make_tables
from mae_et.report.text import csv_of, csv_text, markdown, markdown_table, shown, sort_key, times
from mae_et.report.verdict import make_tiles, make_verdicts, no_verdict
from mae_et.storage.atomic import atomic_path

HERE = Path(__file__).parent
FORMAT = 2  # of report.json
NUM_VERDICTS = 4  # shown at once; the others unfold
SECTIONS = {
    "glance": "Overview",
    "pretraining": "Pre-training",
    "transfer": "Transfer results",
    "other": "Evaluations, features, pictures",
    "published": "Published values",
}
METHOD = (
    "Each run folder is in the tables, in the list of running jobs, in the list of problems with a reason, or left out by "
    "the query.",
    "A result belongs to the pre-training whose encoder weights have the digest that its summary names.",
    "Runs are averaged if they differ in the seed only. ± after a mean is the sample standard deviation over n runs; "
    "one run has none.",
    "Δ is the difference to the baseline in points, with a 95% interval from two sources in quadrature. Seeds: Student's t "
    "of the differences where both sides have the same seeds, else Welch's t. Validation images, for accuracies: the "
    "binomial (Wilson) intervals of both sides. The sides count as independent, which makes the interval cautious.",
    "A difference is seen if its interval excludes 0. A true difference as large as half the interval is seen about half "
    "of the time. Of 20 comparisons without a true difference, about one is seen by chance.",
    "With one run on a side the spread over seeds is unknown, and the interval covers the validation images only. Seeds of "
    "fine-tuning do not cover the spread over seeds of pre-training.",
    "Compute is counted; a backward pass counts as two forward passes. Wall time is training without validation and "
    "saving. Times are compared on equal hardware only; other load on the machine makes them noisy.",
    "Results on other data sets, other numbers of validation images or other recipes are in separate tables or columns.",
    "Published values are marked with source and status; the runs here do not confirm them.",
)
MAX_WIDTH, MAX_HEIGHT = 1000, 1400  # px of an embedded picture
MAX_PICTURE_BYTES = 2_500_000  # of all pictures together, as base64
PICTURES_OF = {"pretrain": 1, "detection": 3, "segmentation": 3, "reconstructions": 4}
PICTURE_TITLES = {
    "pretrain": "Reconstructions",
    "reconstructions": "Reconstructions of chosen images",
    "detection": "Detections",
    "segmentation": "Segmentations",
}


def write_report(benchmark: Benchmark, folder: Path, title: str = "Transfer benchmark", pictures: bool = True) -> None:
    """Writes report.html, report.md, report.json, tables/*.csv and figures/*.{csv,svg}, each file atomically.

    Args:
        benchmark: what to report.
        folder: where to write; tables and figures of an earlier report that no longer exist are deleted.
        title: of the page.
        pictures: embed pictures of the runs.
    """
    tables = make_tables(benchmark)
    figures = [*make_figures(benchmark, tables), *band_figures(benchmark)]
    images, notes = collect_pictures(benchmark) if pictures else ([], [])
    files = {
        "report.json": json.dumps(to_json(benchmark, tables, figures, title), indent=1, ensure_ascii=False) + "\n",
        "tables/runs.csv": runs_csv(benchmark),
        **{f"tables/{table.id}.csv": csv_of(table) for table in tables},
        **{f"figures/{figure.id}.csv": csv_text(figure.header, figure.rows) for figure in figures},
        **{f"figures/{figure.id}.svg": standalone(figure.variants[0][1]) + "\n" for figure in figures},
        **{
            f"figures/search_{i}.svg": standalone(search.picture) + "\n"
            for i, search in enumerate(benchmark.searches, 1)
            if search.picture
        },
        **{
            f"tables/search_{i}.csv": csv_text(HEADER, search.rows)
            for i, search in enumerate(benchmark.searches, 1)
            if search.rows
        },
        "report.md": to_markdown(benchmark, tables, figures, title),
        "report.html": to_html(benchmark, tables, figures, images, notes, title),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")  # names may hold any bytes
    for stale in [*folder.glob("tables/*.csv"), *folder.glob("figures/*.csv"), *folder.glob("figures/*.svg")]:
        if f"{stale.parent.name}/{stale.name}" not in files:
            stale.unlink()


# -------------------------------------------------------------------- HTML


def to_html(
    benchmark: Benchmark,
    tables: list[Table],
    figures: list[Figure],
    pictures: list[Picture],
    notes: list[str],
    title: str,
) -> str:
    """Returns the page. All text of runs is escaped; the policy of the page allows only the script with this hash."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": _data_uri, "svg": Markup, "starting": _starting}
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    light, dark = ("".join(f"--s{i}: {pair[side]}; " for i, pair in enumerate(PALETTE)) for side in (0, 1))
    style = style.replace("/*light*/", light).replace("/*dark*/", dark)
    template = environment.get_template("page.html.j2")
    return template.render(
        title=title,
        version=mae_et.__version__,
        benchmark=benchmark,
        counts=counts(benchmark),
        tiles=make_tiles(benchmark, tables),
        verdicts=make_verdicts(tables) or [no_verdict(benchmark)],
        num_verdicts=NUM_VERDICTS,
        sections=[(key, label, [table for table in tables if table.section == key]) for key, label in SECTIONS.items()],
        figures=figures,
        pictures=pictures,
        picture_titles=PICTURE_TITLES,
        search_header=HEADER,
        notes=notes,
        method=METHOD,
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        shown=shown,
        times=times,
        sort_key=sort_key,
        csv_of=csv_of,
        csv_text=csv_text,
        runs_csv=runs_csv(benchmark),
    )


def _starting(figures: list[Figure], prefixes: list[str]) -> list[Figure]:
    return [figure for figure in figures if figure.id.startswith(tuple(prefixes))]


def _data_uri(text: str) -> str:
    return "data:text/csv;charset=utf-8," + quote(text, errors="backslashreplace")


# -------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI."""

    kind: str
    run: str
    caption: str
    uri: str
    width: int
    height: int


def collect_pictures(benchmark: Benchmark) -> tuple[list[Picture], list[str]]:
    """Returns the newest pictures of each run in the tables, and notes on those left out."""
    pictures: list[Picture] = []
    notes: list[str] = []
    size = num_more = 0
    for kind in PICTURES_OF:
        for run in benchmark.of_kind(kind):
            for path in _newest_pictures(run):
                if size >= MAX_PICTURE_BYTES:
                    num_more += 1
                    continue
                try:
                    picture = _read_picture(run, path)
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    notes.append(f"{run.name}: {path.name} cannot be read: {type(error).__name__}")
                    continue
                size += len(picture.uri)
                pictures.append(picture)
    if num_more:
        notes.append(f"{num_more} more pictures are in the run folders; they would make the page too large")
    return pictures, notes


def _newest_pictures(run: Run) -> Iterable[Path]:
    if run.kind == "reconstructions":
        return run.pictures[: PICTURES_OF[run.kind]]
    steps = [re.findall(r"\d+", path.stem)[-1:] for path in run.pictures]
    last = [path for path, step in zip(run.pictures, steps, strict=True) if step == steps[-1]]
    few = run.pictures if len(last) < PICTURES_OF[run.kind] else last
    return few[-PICTURES_OF[run.kind] :]


def _read_picture(run: Run, path: Path) -> Picture:
    if not path.is_file():  # a pipe would block for ever
        raise ValueError("not a regular file")
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((MAX_WIDTH, MAX_HEIGHT))
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=82, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
    return Picture(run.kind, run.name, path.stem.replace("_", " "), uri, *image.size)


# -------------------------------------------------------------------- Markdown


def to_markdown(benchmark: Benchmark, tables: list[Table], figures: list[Figure], title: str) -> str:
    """Returns the report for a pull request: verdict, tables and figures, without pictures."""
    parts = [f"# {markdown(title)}\n", counts(benchmark) + "\n"]
    parts += [
        # `markdown` strips the space between both parts.
        f"- **{markdown(one.lead)}**{' ' * one.rest.startswith(' ')}{markdown(one.rest)}"
        for one in make_verdicts(tables) or [no_verdict(benchmark)]
    ]
    parts.append("")
    for tile in make_tiles(benchmark, tables):
        parts.append(f"- **{markdown(tile.title)}**: {markdown(tile.value)}. {markdown(tile.note)}")
    parts.append("")
    for key, label in SECTIONS.items():
        own = [table for table in tables if table.section == key]
        if not own:
            continue
        parts.append(f"## {label}\n")
        for table in own:
            header = [column.label for column in table.columns]
            is_text = [column.is_text for column in table.columns]
            rows = [[_cell(row, column) for column in table.columns] for row in table.rows]
            if table.section == "transfer" and any(row.published for row in table.rows):
                header, is_text = [*header, "published by"], [*is_text, True]
                rows = [[*cells, row.published] for cells, row in zip(rows, table.rows, strict=True)]
            parts.append(f"### {markdown(table.title)}\n\n{markdown_table(header, rows, is_text)}")
            if table.note:
                parts.append(f"{markdown(table.note)}\n")
        prefixes = {
            "pretraining": ("loss", "knn", "heldout", "rankme", "alpha", "bands", "curriculum"),
            "transfer": ("results",),
            "published": ("published",),
        }.get(key, ())
        parts += [
            f"![{markdown(figure.title)}](figures/{figure.id}.svg)\n"
            for figure in figures
            if figure.id.startswith(prefixes) and prefixes
        ]
    if benchmark.searches:
        parts.append("## Curriculum searches\n")
    for i, search in enumerate(benchmark.searches, 1):
        parts.append(f"### {markdown(search.path.as_posix())}\n\n{markdown(search.lead)}\n")
        if search.picture:
            parts.append(f"![the decisions of the search](figures/search_{i}.svg)\n")
        if search.rows:
            parts.append(markdown_table(HEADER, search.rows, [True] * len(HEADER)))
    if benchmark.running:
        rows = [[run.name, run.kind, run.reason] for run in benchmark.running]
        parts.append(f"## Running\n\n{markdown_table(['run', 'kind', 'progress'], rows, [True] * 3)}")
    if benchmark.problems:
        rows = [[run.name, run.kind, run.status, run.reason] for run in benchmark.problems]
        parts.append(f"## Not in the tables\n\n{markdown_table(['run', 'kind', 'status', 'why'], rows, [True] * 4)}")
    if benchmark.notes:
        notes = [[note, ", ".join(names)] for note, names in benchmark.notes.items()]
        parts.append(f"## Notes\n\n{markdown_table(['note', 'runs'], notes, [True] * 2)}")
    parts.append("## How the numbers are made\n\n" + "\n".join(f"- {markdown(line)}" for line in METHOD) + "\n")
    return "\n".join(parts)


def _cell(row: Row, column: Column) -> str:
    value = row.values.get(column.key)
    said = shown(value, column)
    return (
        f"{said} ({times(value)})" if said and times(value) and not column.is_text and column.digits in (1, 2) else said
    )


def counts(benchmark: Benchmark) -> str:
    """Returns how many runs are where: "12 runs: 10 in the tables, 1 running, 1 with problems."."""
    parts = [f"{len(benchmark.shown)} in the tables"]
    parts += [f"{len(benchmark.running)} running"] if benchmark.running else []
    parts += [f"{len(benchmark.problems)} with problems"] if benchmark.problems else []
    parts += [f"{len(benchmark.left_out)} left out by the query {benchmark.query}"] if benchmark.left_out else []
    return f"{len(benchmark.runs)} run{'s' if len(benchmark.runs) != 1 else ''}: {', '.join(parts)}."


# -------------------------------------------------------------------- JSON and CSV


def to_json(benchmark: Benchmark, tables: list[Table], figures: list[Figure], title: str) -> dict[str, Any]:
    """Returns the report as plain values. A change of the form raises `format`."""
    places = {"in_tables": benchmark.shown, "running": benchmark.running, "problems": benchmark.problems,
              "left_out": benchmark.left_out}  # fmt: skip
    place_of = {run: place for place, runs in places.items() for run in runs}
    return {
        "format": FORMAT,
        "mae_et": mae_et.__version__,
        "title": title,
        "query": benchmark.query,
        "group_by": list(benchmark.group_by),
        "baseline": benchmark.baseline.label if benchmark.baseline else None,
        "verdicts": [str(verdict) for verdict in make_verdicts(tables)],
        "num_runs": {"all": len(benchmark.runs), **{place: len(runs) for place, runs in places.items()}},
        "runs": [_run_json(benchmark, run, place_of[run]) for run in benchmark.runs],
        "tables": [_table_json(table) for table in tables],
        "figures": [
            {
                "id": figure.id,
                "title": figure.title,
                "axes": [label for label, _ in figure.variants],
                "csv": f"figures/{figure.id}.csv",
            }
            for figure in figures
        ],
    }


def _run_json(benchmark: Benchmark, run: Run, place: str) -> dict[str, Any]:
    origin = benchmark.origin_of.get(run)
    return {
        "name": run.name,
        "path": run.path.as_posix(),
        "kind": run.kind,
        "status": run.status,
        "where": place,
        "reason": run.reason or None,
        "progress": run.progress,
        "notes": run.notes,
        "pretraining": run.source.name if run.source else None,
        "group": origin.label if origin else None,
        "facts": {
            key: value for key, value in run.facts.items() if key not in ("name", "kind", "status", "pretraining")
        },
    }


def _table_json(table: Table) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Statistic):
            return {"mean": value.mean, "sd": value.sd, "n": value.n}
        if isinstance(value, Comparison):
            span = None if value.half is None else [value.value - value.half, value.value + value.half]
            parts = {"seed_half_width": value.seed_half, "image_half_width": value.image_half}
            return {
                "difference": value.value,
                "interval_95": span,
                **parts,
                "n": list(value.ns),
                "paired": value.is_paired,
            }
        if isinstance(value, Ratio):
            return {"ratio": value.value, "standard_error": value.error}
        return value

    return {
        "id": table.id,
        "title": table.title,
        "section": table.section,
        "columns": [{"key": column.key, "label": column.label, "help": column.help} for column in table.columns],
        "rows": [
            {
                "values": {key: plain(value) for key, value in row.values.items() if value is not None},
                "runs": row.runs,
                "published": row.published or None,
                "is_baseline": row.is_baseline,
            }
            for row in table.rows
        ],
    }


def runs_csv(benchmark: Benchmark) -> str:
    """Returns all runs, one a line, with all facts that any run has."""
    runs = benchmark.runs
    names = [name for name in FACTS if any(fact(run, name) is not None for run in runs)]
    rows = []
    for run in runs:
        origin = benchmark.origin_of.get(run)
        known = [run.path.as_posix(), run.reason, origin.label if origin else None]
        rows.append([*known, *(fact(run, name) for name in names)])
    return csv_text(["path", "reason", "group", *names], rows)
