"""What an inspection of a data set found: errors that stop a run, warnings, and counts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mae_et.errors import DataError

log = logging.getLogger(__name__)
NUM_NAMED = 3


@dataclass
class Findings:
    """Findings about one data set.

    Args:
        where: the data set, e.g. its annotation file.
        errors: each with its fix; any of them stops the run.
        warnings: what the run survives, but a user should know.
        counts: name -> number, for the log and summary.json.
    """

    where: str
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)

    def count(self, name: str, items: Sequence[Any]) -> None:
        """Notes how many items there are and the first of them, if there are any."""
        if items:
            self.counts[name] = len(items)
            self.warnings.append(f"{len(items)} {name}, e.g. {named(items)}")


def report(findings: Iterable[Findings]) -> dict[str, list[dict[str, str]]]:
    """Logs warnings and counts of all data sets, then stops at errors.

    Returns:
        The findings for summary.json, as `Summary.data_findings` in mae_et/runs/records.py.
    Raises:
        DataError: with the errors of all data sets.
    """
    every = list(findings)
    for one in every:
        counted = ", ".join(f"{value} {name}" for name, value in one.counts.items() if isinstance(value, int))
        log.info("%s: %s", one.where, counted or "nothing to report")
        for warning in one.warnings:
            log.warning("%s: %s", one.where, warning)
    wrong = [f"{one.where}: {error}" for one in every for error in one.errors]
    if wrong:
        raise DataError(
            wrong[0] if len(wrong) == 1 else "the data has errors:\n" + "\n".join(f"  - {x}" for x in wrong)
        )
    rows: dict[str, list[dict[str, str]]] = {"warning": [], "count": []}
    for one in every:
        rows["warning"] += [{"kind": one.where, "text": warning, "fix": ""} for warning in one.warnings]
        rows["count"] += [
            {"kind": one.where, "text": f"{value} {name}", "fix": ""} for name, value in one.counts.items()
        ]
    return rows


def named(items: Sequence[Any]) -> str:
    """Returns the first few items in one line."""
    return ", ".join(str(item) for item in items[:NUM_NAMED]) + (", ..." if len(items) > NUM_NAMED else "")
