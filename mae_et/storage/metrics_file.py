"""`metrics.jsonl`: what a run logs, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mae_et.storage.checkpoint import atomic_path


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each with its `step`.

    Args:
        path: where.
        first_step: lines of later steps are dropped: a resumed run writes them anew.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        kept = [line for line in read_jsonl(path) if line["step"] <= first_step] if path.exists() else []
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed by `close`)

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics file; a last line cut off by a kill is passed over."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
