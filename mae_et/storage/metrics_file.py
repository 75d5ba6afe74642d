"""`metrics.jsonl`: what a run logs, one JSON object per line."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mae_et.storage.atomic import atomic_path, write_error

log = logging.getLogger(__name__)

_RETRY = "run again with --resume"
_BLOCK_BYTES = 4 << 20
_FIRST_KEY = b'{"step": '


class MetricsFile:
    """Writes `metrics.jsonl`. Each line has its `step`; a number that is not finite becomes null.

    An existing file is cut behind the last line that is kept. Only the form of these lines is checked, not their JSON, so
    half a million lines take less than a second. If a line does not have the form in which this class writes, all lines are
    parsed. A file with damaged lines is renamed, and its readable lines go into the new one.

    Args:
        path: of the file.
        first_step: lines of later steps are dropped, because a resumed run writes them again.
    Raises:
        CheckpointError: here and in `write` and `close`, if the file cannot be written.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self.path = path
        end = _end_of_kept(path, first_step) if path.exists() else None
        if end is None:
            self._write_again(first_step)
        try:
            self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed by `close`)
            if end is not None:
                self._file.truncate(end)
        except OSError as error:
            raise write_error(path, error, _RETRY) or error from error

    def _write_again(self, first_step: int) -> None:
        """Replaces the file by its readable lines up to a step; a damaged file is kept under another name."""
        lines, num_damaged = _read(self.path) if self.path.exists() else ([], 0)
        if num_damaged:
            aside = _free_name(self.path)
            self.path.rename(aside)
            log.warning("%s: %d lines are damaged; the file is kept as %s", self.path, num_damaged, aside.name)
        kept = [line for line in lines if line["step"] <= first_step]
        with atomic_path(self.path, _RETRY) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

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
    """Returns the readable lines of a metrics file and logs how many are not; a missing file has none."""
    lines, num_damaged = _read(path) if path.exists() else ([], 0)
    if num_damaged:
        log.warning("%s: %d lines are damaged and left out", path, num_damaged)
    return lines


def _end_of_kept(path: Path, first_step: int) -> int | None:
    """Returns where the lines up to a step end, in bytes; None if a line before that has another form than `write` gives.

    Steps never decrease in a file that was written here, so the search stops at the first later one.
    """
    end = 0
    with path.open("rb") as file:
        # A kill can cut off the last line: what has no line end is dropped.
        while b"\n" in (block := file.read(_BLOCK_BYTES) + file.readline()):
            block = block[: block.rindex(b"\n") + 1]
            last = _step_of(block[block.rfind(b"\n", 0, -1) + 1 :])
            if last is None:
                return None
            if last > first_step:
                lines = block.splitlines(keepends=True)
                steps = [_step_of(line) for line in lines]
                if None in steps:
                    return None
                num_kept = next(i for i, step in enumerate(steps) if step is not None and step > first_step)
                block = b"".join(lines[:num_kept])
            if block and not _has_our_form(block):
                return None
            end += len(block)
            if last > first_step:
                break
    return end


def _has_our_form(block: bytes) -> bool:
    """Tells whether each line is ASCII, begins with the step as a number, has no other step, and ends with a brace."""
    characters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(characters == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])
    if not block.isascii() or (ends - starts).min() < len(_FIRST_KEY) + 2 or block.count(_FIRST_KEY) != len(ends):
        return False
    heads = characters[starts[:, None] + np.arange(len(_FIRST_KEY) + 1)]
    digits = (heads[:, -1] >= ord("0")) & (heads[:, -1] <= ord("9"))
    return bool((heads[:, :-1] == np.frombuffer(_FIRST_KEY, np.uint8)).all() and digits.all()) and bool(
        (characters[ends - 1] == ord("}")).all()
    )


def _step_of(line: bytes) -> int | None:
    match = re.match(rb'\{"step": (\d+)[,}]', line)
    return int(match[1]) if match else None


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
