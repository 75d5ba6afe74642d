"""Reading and writing of records as JSON files."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError

from mae_et.runs.records import KINDS, RECORD_VERSION, AnySummary, PlanRecord, Record
from mae_et.storage.atomic import atomic_path

MAX_BYTES = 2**26
_SUMMARY: TypeAdapter[Any] = TypeAdapter(AnySummary)
R = TypeVar("R", bound=Record)


def write_record(path: Path, record: Record) -> None:
    """Writes a record as JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        text = json.dumps(record.model_dump(mode="json"), indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_summary(path: Path) -> AnySummary:
    """Reads summary.json of any task.

    Raises:
        ValueError: if the file is not such a record, in one line.
        OSError: if it cannot be read.
    """
    values = read_json(path)
    _check_version(values)
    return _validate(values, _SUMMARY)


def read_record(path: Path, model: type[R]) -> R:
    """Reads a record of a known type. Errors as for `read_summary`."""
    values = read_json(path)
    _check_version(values)
    return _validate(values, TypeAdapter(model))


def read_plan(path: Path) -> PlanRecord:
    """Reads the stages of plan.json, which has no version. Errors as for `read_summary`."""
    return _validate(read_json(path), TypeAdapter(PlanRecord))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a regular file of limited size; a pipe or device could block for ever.

    Raises:
        ValueError: if it is not a regular file, too large, not JSON, not an object, or holds NaN.
        OSError: if it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"{status.st_size} bytes; the limit is {MAX_BYTES}")
    if status.st_size == 0:
        raise ValueError("empty")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        detail = str(error) if str(error).startswith("holds") else f"not valid JSON ({type(error).__name__})"
        raise ValueError(detail) from error
    if not isinstance(values, dict):
        raise ValueError(f"holds a {type(values).__name__}, not an object")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is not JSON")


def _check_version(values: Mapping[str, Any]) -> None:
    version = values.get("record_version")
    if version != RECORD_VERSION or isinstance(version, bool):
        shown = "none" if version is None else repr(version)[:40]
        raise ValueError(f"record_version is {shown}, but this version of mae_et reads {RECORD_VERSION}")


def _validate(values: Mapping[str, Any], adapter: TypeAdapter[Any]) -> Any:
    try:
        return adapter.validate_json(json.dumps(values))  # JSON mode: lists become tuples, numbers stay strict
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_context=False)
        place = ".".join(str(part) for part in first["loc"] if part not in KINDS)
        more = f" (and {len(others)} more faults)" if others else ""
        said = f"{place}: " if place else ""
        raise ValueError(f"{said}{first['msg'][:200]}, found {repr(first.get('input'))[:60]}{more}") from error
