"""A benchmark written down: one HTML page that needs nothing else, Markdown, JSON and CSV."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

import mae_et
from mae_et.report.benchmark import Benchmark
from mae_et.report.drawing import PALETTE, standalone
from mae_et.report.figures import Figure, make_figures
from mae_et.report.groups import Difference, Ratio, Statistic
from mae_et.report.pictures import TITLES, Picture, collect
from mae_et.report.records import Run
from mae_et.report.tables import Table, make_tables
from mae_et.report.text import csv_of, csv_text, markdown, markdown_table, shown, sort_key, times
from mae_et.report.tiles import make_tiles
from mae_et.storage.atomic import atomic_path

HERE = Path(__file__).parent
FORMAT = 1  # of report.json
SECTIONS = {
    "glance": "At a glance",
    "pretraining": "Pre-training",
    "transfer": "What it is worth",
    "other": "Evaluations, features, pictures",
    "published": "Published values",
}
METHOD = (
    "A run is a folder that one of the tools wrote. Each is either in the tables, or listed with the reason why "
    "it is not, or left out by the filter.",
    "A result belongs to the pre-training whose encoder weights have the digest that its record names; records of "
    "older versions are joined by the name of the folder, and say so.",
    "Runs are averaged if they differ in nothing but the seed. ± in a value is the sample standard deviation over "
    "n runs; one run has none.",
    "Δ is the difference of two means; its ± is the standard error √(s₁²/n₁ + s₂²/n₂) (Welch). With one run on a "
    "side there is none. Less than about two standard errors says nothing; with three runs a side, less than "
    "about three.",
    "Compute is counted, a backward pass as two forward ones. Wall time is training alone. Times are compared on "
    "equal hardware only, and shared machines make them noisy.",
    "Metrics of different data sets, numbers of validation images or recipes stand in different tables or columns.",
    "Published values are marked with source and status, and nothing here confirms them.",
)


def write_report(benchmark: Benchmark, folder: Path, title: str = "Transfer benchmark", pictures: bool = True) -> bool:
    """Writes report.html, report.md, report.json, tables/*.csv and figures/*.{csv,svg}, each of them whole or not at all.

    Args:
        benchmark: what to write.
        folder: where.
        title: of the page.
        pictures: whether to put the runs' pictures in.
    Returns:
        Whether report.html is another one than before.
    """
    tables = make_tables(benchmark)
    figures = make_figures(benchmark, tables)
    images, notes = collect(benchmark) if pictures else ([], [])
    files = {
        "report.json": json.dumps(to_json(benchmark, tables, figures, title), indent=1, ensure_ascii=False) + "\n",
        "tables/runs.csv": runs_csv(benchmark),
        **{f"tables/{table.id}.csv": csv_of(table) for table in tables},
        **{f"figures/{figure.id}.csv": csv_text(figure.header, figure.rows) for figure in figures},
        **{f"figures/{figure.id}.svg": standalone(figure.variants[0][1]) + "\n" for figure in figures},
        "report.md": to_markdown(benchmark, tables, figures, title),
        "report.html": to_html(benchmark, tables, figures, images, notes, title),
    }
    html = folder / "report.html"
    is_new = not html.is_file() or html.read_text(encoding="utf-8", errors="replace") != files["report.html"]
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    for stale in [*folder.glob("tables/*.csv"), *folder.glob("figures/*.csv"), *folder.glob("figures/*.svg")]:
        if f"{stale.parent.name}/{stale.name}" not in files:
            stale.unlink()
    return is_new


# -------------------------------------------------------------------- HTML


def to_html(
    benchmark: Benchmark,
    tables: list[Table],
    figures: list[Figure],
    pictures: list[Picture],
    notes: list[str],
    title: str,
) -> str:
    """Returns the page. Everything that comes from runs is escaped; the page's own script is named by its hash."""
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
        tiles=make_tiles(benchmark, tables),
        sections=[(key, label, [table for table in tables if table.section == key]) for key, label in SECTIONS.items()],
        figures=figures,
        pictures=pictures,
        picture_titles=TITLES,
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
    return "data:text/csv;charset=utf-8," + quote(text)


# -------------------------------------------------------------------- Markdown


def to_markdown(benchmark: Benchmark, tables: list[Table], figures: list[Figure], title: str) -> str:
    """Returns the report for a pull request: tables and figures, without pictures."""
    parts = [f"# {markdown(title)}\n", counts(benchmark) + "\n"]
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
            "pretraining": ("loss", "knn", "curriculum"),
            "transfer": ("worth",),
            "published": ("published",),
        }.get(key, ())
        parts += [
            f"![{markdown(figure.title)}](figures/{figure.id}.svg)\n"
            for figure in figures
            if figure.id.startswith(prefixes) and prefixes
        ]
    if benchmark.problems:
        rows = [[run.name, run.kind, run.status, run.reason] for run in benchmark.problems]
        parts.append(f"## Not in the tables\n\n{markdown_table(['run', 'kind', 'status', 'why'], rows, [True] * 4)}")
    if benchmark.notes:
        odd = [[note, ", ".join(names)] for note, names in benchmark.notes.items()]
        parts.append(f"## Notes\n\n{markdown_table(['what', 'runs'], odd, [True] * 2)}")
    parts.append("## How the numbers are made\n\n" + "\n".join(f"- {markdown(line)}" for line in METHOD) + "\n")
    return "\n".join(parts)


def _cell(row: Any, column: Any) -> str:
    value = row.values.get(column.key)
    said = shown(value, column)
    return (
        f"{said} ({times(value)})" if said and times(value) and not column.is_text and column.digits in (1, 2) else said
    )


def counts(benchmark: Benchmark) -> str:
    """Says where the records are: "12 runs: 10 in the tables, 2 not"."""
    runs, left = len(benchmark.runs), len(benchmark.left_out)
    filtered = f", {left} left out by the filter {benchmark.filter}" if left else ""
    return f"{runs} run{'s' if runs != 1 else ''}: {len(benchmark.shown)} in the tables, {len(benchmark.problems)} not{filtered}."


# -------------------------------------------------------------------- JSON and CSV


def to_json(benchmark: Benchmark, tables: list[Table], figures: list[Figure], title: str) -> dict[str, Any]:
    """Returns the report as plain values. Changes to its form raise `format`."""
    return {
        "format": FORMAT,
        "mae_et": mae_et.__version__,
        "title": title,
        "filter": benchmark.filter,
        "group_by": list(benchmark.group_by),
        "baseline": benchmark.baseline.label if benchmark.baseline else None,
        "num_runs": {
            "all": len(benchmark.runs),
            "in_tables": len(benchmark.shown),
            "problems": len(benchmark.problems),
            "left_out": len(benchmark.left_out),
        },
        "runs": [_run_json(benchmark, run) for run in benchmark.runs],
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


def _run_json(benchmark: Benchmark, run: Run) -> dict[str, Any]:
    where = "in_tables" if run in benchmark.shown else "problems" if run in benchmark.problems else "left_out"
    origin = benchmark.origin_of.get(run)
    return {
        "name": run.name,
        "path": run.path.as_posix(),
        "kind": run.kind,
        "status": run.status,
        "where": where,
        "reason": run.reason or None,
        "notes": run.notes,
        "pretraining": run.source.name if run.source else None,
        "group": origin.label if origin else None,
        "facts": {key: value for key, value in run.facts.items() if key not in ("name", "kind", "status")},
    }


def _table_json(table: Table) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Statistic):
            return {"mean": value.mean, "sd": value.sd, "n": value.n}
        if isinstance(value, Difference):
            return {"difference": value.value, "standard_error": value.error}
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
    """Returns all records, one a line, with every fact."""
    keys = {key: None for run in benchmark.runs for key in run.facts if key not in ("name", "kind", "status")}
    header = ["name", "path", "kind", "status", "reason", "pre-training", "group", *keys]
    rows = []
    for run in benchmark.runs:
        origin = benchmark.origin_of.get(run)
        known = [
            run.name,
            run.path.as_posix(),
            run.kind,
            run.status,
            run.reason,
            run.source.name if run.source else "",
            origin.label if origin else "",
        ]
        rows.append([*known, *(run.facts.get(key) for key in keys)])
    return csv_text(header, rows)
