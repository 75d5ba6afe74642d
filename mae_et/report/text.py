"""Formats values, and escapes text for Markdown and CSV; the template escapes HTML."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from mae_et.report.compare import MINUS, Comparison, Ratio, Statistic, interval, points
from mae_et.report.tables import Column, Row, Table, Value

PARTS = {
    Statistic: ("", " sd", " n"),
    Comparison: ("", " 95% low", " 95% high"),
    Ratio: ("", " standard error"),
}  # columns of a CSV for one column of a table
_MARKS = re.compile(r"([\\`*_{}\[\]#|~$>])")


def shown(value: Value, column: Column) -> str:
    """Returns a cell as text: mean ± deviation, ratio ± error, difference with its interval; nothing for an empty cell."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Comparison):
        span = interval(value)
        return points(value.value) + (f" ({span})" if span else "")
    if isinstance(value, Ratio):
        error = "" if value.error is None else f" ± {_number(value.error, column.digits)}"
        return f"{_number(value.value, column.digits)}{error}"
    if isinstance(value, Statistic):
        spread = value.sd is not None and (value.sd > 1e-9 * abs(value.mean) or column.digits not in (None, 0))
        return _number(value.mean, column.digits) + (f" ± {_number(value.sd or 0.0, column.digits)}" if spread else "")
    return _number(value, column.digits)


def times(value: Value) -> str:
    """Returns "n=3" of a mean of several values."""
    return f"n={value.n}" if isinstance(value, Statistic) else ""


def sort_key(value: Value) -> float | str:
    """Returns the sort key of a cell: a number, or text; empty cells come last."""
    if isinstance(value, Statistic):
        return value.mean
    if isinstance(value, Comparison | Ratio):
        return value.value
    return "" if value is None else value


def _number(value: float, digits: int | None) -> str:
    if digits is None:
        text = f"{value:.3g}"
        return f"{float(text):,.0f}" if "e+" in text and abs(value) < 1e12 else text
    return f"{value:,.{digits}f}".replace("-", MINUS)


def markdown(text: Any) -> str:
    """Escapes text for Markdown: no markup, no HTML, no early end of a table cell, no mention of users."""
    words = " ".join(str(text).split())
    words = _MARKS.sub(r"\\\1", words)
    return words.replace("&", "&amp;").replace("<", "&lt;").replace("@", "&#64;")


def markdown_table(header: Sequence[Any], rows: Iterable[Sequence[Any]], is_text: Sequence[bool]) -> str:
    """Returns a Markdown table; cells are escaped."""
    lines = ["| " + " | ".join(map(markdown, header)) + " |"]
    lines.append("|" + "|".join(" --- " if left else " ---: " for left in is_text) + "|")
    lines += ["| " + " | ".join(map(markdown, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns CSV whose texts a spreadsheet does not take for formulas."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([_harmless(cell) for cell in header])
    writer.writerows([[_harmless(cell) for cell in row] for row in rows])
    return stream.getvalue()


def csv_of(table: Table) -> str:
    """Returns a table as CSV with a column for each number: mean, deviation and n; difference and interval."""
    header: list[str] = []
    for column in table.columns:
        kinds = {type(row.values.get(column.key)) for row in table.rows}
        parts = next((PARTS[kind] for kind in PARTS if kind in kinds), ("",))
        name = f"{column.help}: {column.label}" if column.label == "Δ" else column.label
        header += [f"{name}{part}" for part in parts]
    header += ["published", "baseline", "runs"]
    return csv_text(header, (_cells(table, row) for row in table.rows))


def _cells(table: Table, row: Row) -> list[Any]:
    cells: list[Any] = []
    for column in table.columns:
        value = row.values.get(column.key)
        kinds = {type(other.values.get(column.key)) for other in table.rows}
        width = next((len(PARTS[kind]) for kind in PARTS if kind in kinds), 1)
        if isinstance(value, Statistic):
            cells += [value.mean, value.sd, value.n]
        elif isinstance(value, Comparison):
            low, high = (None, None) if value.half is None else (value.value - value.half, value.value + value.half)
            cells += [value.value, low, high]
        elif isinstance(value, Ratio):
            cells += [value.value, value.error]
        else:
            cells += [value, *[None] * (width - 1)]
    return [*cells, row.published, row.is_baseline, "; ".join(row.runs)]


def _harmless(cell: Any) -> Any:
    if isinstance(cell, str):
        cell = cell.replace("\0", "").replace("\r", " ")  # the csv module leaves \\r without quotes
        return f"'{cell}" if cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell
    return cell
