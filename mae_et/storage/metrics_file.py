"""`metrics.jsonl`: the log of a run, one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mae_et.storage.atomic import atomic_path, write_error

_RETRY = "run again with --resume"


class MetricsFile:
    """Appends to `metrics.jsonl`: one JSON object per line, each with its `step`.

    Args:
        path: of the file.
        first_step: lines of later steps are dropped, because a resumed run writes them again.
    Raises:
        CheckpointError: here and in `write` and `close`, if the file cannot be written.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self.path = path
        kept = [line for line in read_jsonl(path) if line["step"] <= first_step] if path.exists() else []
        with atomic_path(path, _RETRY) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed by `close`)

    def write(self, values: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise write_error(self.path, error, _RETRY) or error from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise write_error(self.path, error, _RETRY) or error from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics file. A last line that a kill cut off is skipped."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
