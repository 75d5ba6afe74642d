"""Values as text, and text that is safe where it goes: HTML is escaped by the template, Markdown and CSV here."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from mae_et.report.groups import Difference, Ratio, Statistic
from mae_et.report.tables import Column, Table, Value

MINUS = "−"
_MARKS = re.compile(r"([\\`*_{}\[\]#|~$>])")


def shown(value: Value, column: Column) -> str:
    """Returns a cell as text: mean ± deviation, difference ± its error; nothing for an empty cell."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Difference):
        sign = MINUS if value.value < 0 else "+"
        error = "" if value.error is None else f" ± {_number(value.error, column.digits)}"
        return f"{sign}{_number(abs(value.value), column.digits)}{error}"
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
    """Returns what a table is sorted by: numbers by value, text by itself, empty cells last."""
    if isinstance(value, Statistic):
        return value.mean
    if isinstance(value, Difference | Ratio):
        return value.value
    return "" if value is None else value


def _number(value: float, digits: int | None) -> str:
    if digits is None:
        said = f"{value:.3g}"
        return f"{float(said):,.0f}" if "e+" in said else said
    return f"{value:,.{digits}f}".replace("-", MINUS)


def markdown(text: Any) -> str:
    """Returns text that Markdown shows as it is: no markup, no HTML, no table cell that ends early, nobody called by name."""
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
    """Returns CSV in which no text is taken for a formula by a spreadsheet."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([_harmless(cell) for cell in header])
    writer.writerows([[_harmless(cell) for cell in row] for row in rows])
    return stream.getvalue()


def csv_of(table: Table) -> str:
    """Returns a table with a column for each number: mean, deviation and n, difference and error."""
    header: list[str] = []
    for column in table.columns:
        sample = next((value for row in table.rows if (value := row.values.get(column.key)) is not None), None)
        parts = {Statistic: ("", " sd", " n"), Difference: ("", " standard error"), Ratio: ("", " standard error")}.get(
            type(sample), ("",)
        )
        name = f"{column.help}: {column.label}" if column.label == "Δ" else column.label
        header += [f"{name}{part}" for part in parts]
    header += ["published", "baseline", "runs"]
    return csv_text(header, (_cells(table, row) for row in table.rows))


def _cells(table: Table, row: Any) -> list[Any]:
    cells: list[Any] = []
    for column in table.columns:
        value = row.values.get(column.key)
        kinds = {type(other.values.get(column.key)) for other in table.rows}
        if Statistic in kinds:
            cells += [value.mean, value.sd, value.n] if isinstance(value, Statistic) else [value, None, None]
        elif kinds & {Difference, Ratio}:
            cells += [value.value, value.error] if isinstance(value, Difference | Ratio) else [None, None]
        else:
            cells.append(value)
    return [*cells, row.published, row.is_baseline, "; ".join(row.runs)]


def _harmless(cell: Any) -> Any:
    if isinstance(cell, str):
        cell = cell.replace("\0", "").replace("\r", " ")  # the csv module would leave \\r without quotes
        return f"'{cell}" if cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell
    return cell
