"""A run as the report sees it. Whatever a file holds, these accessors give a number, a text, or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("pretrain", "classify", "detection", "segmentation", "features", "reconstructions")
FINISHED, UNFINISHED, BROKEN, DUPLICATE = "finished", "unfinished", "broken", "duplicate"


@dataclass(eq=False)
class Run:
    """One run. It ends either in the tables or, with a reason, in the list of those that are not."""

    path: Path  # the folder; of features the JSON file
    name: str  # unique within a report
    kind: str = "unknown"
    status: str = BROKEN
    reason: str = ""  # why it is in no table
    notes: list[str] = field(default_factory=list)  # what was odd, and is in the tables all the same
    summary: dict[str, Any] = field(default_factory=dict)
    tests: list[dict[str, Any]] = field(default_factory=list)  # evaluations by tools/test.py
    environment: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl
    pictures: list[Path] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # what filters and groups ask for; see facts.py
    source: Run | None = None  # the pre-training that the backbone comes from

    def fail(self, status: str, reason: str) -> None:
        """Takes the run out of the tables; the first reason stays."""
        if self.status == FINISHED or not self.reason:
            self.status, self.reason = status, reason


def number(values: Any, *keys: str) -> float | None:
    """Returns the finite number under nested keys; None where there is none."""
    value = dig(values, *keys)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def text(values: Any, *keys: str) -> str | None:
    """Returns the text under nested keys; None where there is none."""
    value = dig(values, *keys)
    return value if isinstance(value, str) and value else None


def dig(values: Any, *keys: str) -> Any:
    """Returns what is under nested keys; None where there is nothing."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
