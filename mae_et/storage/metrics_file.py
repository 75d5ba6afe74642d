"""`metrics.jsonl`: what a run logs, one JSON object per line."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_et.storage.atomic import atomic_path, write_error

log = logging.getLogger(__name__)

_RETRY = "run again with --resume"


class MetricsFile:
    """Writes `metrics.jsonl`. Each line has its `step`; a number that is not finite becomes null.

    A file that is damaged is renamed; its readable lines go into the new one.

    Args:
        path: of the file.
        first_step: lines of later steps are dropped, because a resumed run writes them again.
    Raises:
        CheckpointError: here and in `write` and `close`, if the file cannot be written.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self.path = path
        lines, num_damaged = _read(path) if path.exists() else ([], 0)
        if num_damaged:
            aside = _free_name(path)
            path.rename(aside)
            log.warning("%s: %d lines are damaged; the file is kept as %s", path, num_damaged, aside.name)
        kept = [line for line in lines if line["step"] <= first_step]
        with atomic_path(path, _RETRY) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed by `close`)

    def write(self, values: Mapping[str, Any]) -> None:
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        try:
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        except OSError as error:
            raise write_error(self.path, error, _RETRY) or error from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise write_error(self.path, error, _RETRY) or error from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the readable lines of a metrics file; a missing file has none."""
    return _read(path)[0] if path.exists() else []


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the readable lines, and the number of the others. A last line that a kill cut off does not count."""
    *whole, _ = path.read_bytes().split(b"\n")
    lines, num_damaged = [], 0
    for raw in whole:
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        else:
            num_damaged += 1
    return lines, num_damaged


def _free_name(path: Path) -> Path:
    numbers = range(1, 10**6)
    return next(name for n in numbers if not (name := path.with_suffix(f".damaged-{n}.jsonl")).exists())
