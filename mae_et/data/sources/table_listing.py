"""Reads list files and tables of images. A large listing is kept in the cache folder as a file that all processes map.

A kept listing is found by the SHA-256 of the file's content. The paths are looked up when that content is first read: an image
that disappears later is unreadable, and is counted as such.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae_et.data.sources.cache import cached_path, locked, replacing, warn_not_kept
from mae_et.data.sources.listing import NO_LABEL, PackedNames, narrow, some_of
from mae_et.data.sources.tar_index import MAX_LABEL
from mae_et.errors import DataError, printable
from mae_et.storage.array_file import map_arrays, write_arrays

log = logging.getLogger(__name__)

PATH_COLUMN, LABEL_COLUMN = "path", "label"
KEPT_FROM = 1 << 18  # bytes of a file: smaller ones are read each time, in milliseconds
_VERSION = 1
_NUM_THREADS = 16  # hide the latency of network file systems
_INTEGER = re.compile(r"[+-]?\d+")
_LABELLED_LINE = re.compile(r"(.*\S)\s+([+-]?\d+)")
Label = str | int | None
_SCALARS = (str, int, float, type(None))


class TableListing:
    """The images that a list file or a table names, in its order.

    Attributes:
        names: the paths as they are written.
        labels: [N] int32, numbers as they are written, or places in `label_names`; NO_LABEL where there is none.
        label_names: sorted, if the labels are names; None if they are numbers.
        has_labels: whether the file has labels at all.
        num_repeated: entries whose path has occurred before.
        repeated: examples of these.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        self.names = PackedNames(arrays["names"], arrays["name_ends"])
        self.labels = arrays["labels"]
        self.label_names: list[str] | None = about["label_names"]
        self.has_labels: bool = about["has_labels"]
        self.num_repeated: int = about["num_repeated"]
        self.repeated: list[str] = about["repeated"]


class Columns(NamedTuple):
    """The columns of a table. None: `PATH_COLUMN`, which must be there, and `LABEL_COLUMN`, which may be absent."""

    path: str | None = None
    label: str | None = None


def list_table(file: Path, root: Path, columns: Columns) -> TableListing:
    """Reads a list file or a table, or maps the listing that the cache folder has.

    Args:
        file: .txt, .csv, .tsv or .parquet.
        root: that relative paths begin at.
        columns: of a table.
    Raises:
        DataError: if the file cannot be read, a column or a file is missing, or labels are faulty.
    """
    shown = printable(str(file))
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}") from error
    if len(content) < KEPT_FROM:
        return TableListing(*_packed(*_read(file, content, columns), root, shown))
    digest = hashlib.sha256(content).hexdigest()
    kept = cached_path(file.name, f"{_VERSION}\0{digest}\0{root.resolve()}\0{columns}", ".table")
    with locked(kept, f"reads {shown}"):
        try:
            return TableListing(*map_arrays(kept))
        except (OSError, ValueError, KeyError):  # not there, cut off or foreign
            pass
        arrays, about = _packed(*_read(file, content, columns), root, shown)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as out:
                write_arrays(out, arrays, about)
            arrays, about = map_arrays(kept)
        except OSError as error:
            warn_not_kept(f"the listing of {shown}", error)
        return TableListing(arrays, about)


def encode_labels(
    labels: Sequence[Label], name: Callable[[int], str], shown: str
) -> tuple[np.ndarray, list[str] | None]:
    """Returns labels as numbers.

    Args:
        labels: numbers (also as text) or names; None, "" or NaN: missing.
        name: returns the name of an entry, for messages.
        shown: the data set, for messages.
    Returns:
        [N] int32, NO_LABEL where a label is missing; the sorted names, or None if the labels are numbers.
    Raises:
        DataError: if a number is negative or above `MAX_LABEL`, or a label is neither text nor a whole number.
    """
    known: dict[Label, Label] = {label: _plain(label) for label in labels if isinstance(label, _SCALARS)}
    odd = [label for label in labels if not isinstance(label, _SCALARS) or isinstance(known[label], float)]
    if odd:
        raise DataError(
            f"{shown} has labels that are neither names nor whole numbers: {some_of([repr(label)[:40] for label in odd])}; name "
            "another column, e.g. ,label=COLUMN"
        )
    used = {plain for plain in known.values() if plain is not None}
    if all(isinstance(plain, int) or _INTEGER.fullmatch(plain) for plain in used):
        numbers = {label: NO_LABEL if plain is None else int(plain) for label, plain in known.items()}
        if wrong := [
            i for i, label in enumerate(labels) if known[label] is not None and not 0 <= numbers[label] <= MAX_LABEL
        ]:
            examples = some_of([f"{numbers[labels[i]]} of {name(i)}" for i in wrong[:5]])
            raise DataError(
                f"{shown} has {len(wrong)} labels that are out of range, e.g. {examples}; number the classes from 0 (at most "
                f"{MAX_LABEL}), and leave the label away where there is none"
            )
        return np.fromiter((numbers[label] for label in labels), np.int32, len(labels)), None
    ordered = sorted(map(str, used))
    places = {name: place for place, name in enumerate(ordered)}
    numbers = {label: NO_LABEL if plain is None else places[str(plain)] for label, plain in known.items()}
    return np.fromiter((numbers[label] for label in labels), np.int32, len(labels)), ordered


def _plain(label: Any) -> Any:
    """Returns a label as text, number or None; a whole number that is stored as a float becomes an int."""
    if isinstance(label, float):  # as pandas writes a column of integers with gaps
        return None if math.isnan(label) else int(label) if label.is_integer() else label
    if isinstance(label, str):
        return label.strip() or None
    return label


def _read(file: Path, content: bytes, columns: Columns) -> tuple[list[str], list[Label] | None]:
    """Returns the paths, and the labels if there are any."""
    suffix, shown = file.suffix.lower(), printable(str(file))
    if suffix == ".parquet":
        paths, labels = _read_parquet(content, columns, shown)
    else:
        # Paths may hold bytes that are not UTF-8, as names of files may.
        text = content.decode("utf-8-sig", "surrogateescape")
        if suffix == ".txt":
            paths, labels = _read_lines(text)
        else:
            paths, labels = _read_csv(text, "\t" if suffix == ".tsv" else ",", columns, shown)
    if not paths:
        raise DataError(f"{shown} names no images; write one path per line")
    if odd := [place for place, path in enumerate(paths, 1) if not isinstance(path, str) or not path]:
        raise DataError(
            f"{shown} has {len(odd)} entries without a path, e.g. number {', '.join(map(str, odd[:5]))}; complete or remove them"
        )
    return paths, labels


def _read_lines(text: str) -> tuple[list[str], list[Label] | None]:
    """Reads `PATH`, `PATH NUMBER` or `PATH<tab>LABEL` from each line that is not blank."""
    lines = [line for line in map(str.strip, re.split(r"\r?\n", text)) if line]
    if any("\t" in line for line in lines):
        rows = [line.rpartition("\t") if "\t" in line else (line, "", "") for line in lines]
        return [path.strip() for path, _, _ in rows], [label for _, _, label in rows]
    matches = [_LABELLED_LINE.fullmatch(line) for line in lines]
    if not any(matches):
        return lines, None
    return (
        [match[1] if match else line for match, line in zip(matches, lines, strict=True)],
        [match and match[2] for match in matches],
    )


def _read_csv(text: str, delimiter: str, columns: Columns, shown: str) -> tuple[list[str], list[Label] | None]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        chosen = [header.index(name) for name in choose_columns(header, columns, shown)]
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{shown} cannot be read: {error} in line {reader.line_num}") from error
    if short := [place for place, row in enumerate(rows, 1) if len(row) != len(header)]:
        raise DataError(
            f"{shown} has {len(short)} rows with another number of cells than its header ({len(header)}), e.g. row {short[0]} "
            "after the header; quote cells that hold the separator"
        )
    path, *label = ([row[column].strip() for row in rows] for column in chosen)
    return path, label[0] if label else None  # type: ignore[return-value]


def _read_parquet(content: bytes, columns: Columns, shown: str) -> tuple[list[str], list[Label] | None]:
    try:
        from pyarrow import BufferReader, parquet
    except ImportError as error:
        raise DataError(f"{shown} cannot be read without pyarrow: pip install 'mae_et[datasets]'") from error
    try:
        table = parquet.ParquetFile(BufferReader(content))
        chosen = choose_columns(table.schema_arrow.names, columns, shown)
        path, *label = (table.read([name]).column(name) for name in chosen)
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shown} is damaged or not a parquet file: {str(error).splitlines()[0]}") from error
    if str(path.type) not in ("string", "large_string", "string_view") and "dictionary<values=string" not in str(
        path.type
    ):
        raise DataError(
            f"{shown}: column {chosen[0]!r} holds {path.type}, not paths; images that are stored in the table itself are named "
            "datasets:FOLDER, the folder with the table"
        )
    return path.to_pylist(), label[0].to_pylist() if label else None


def choose_columns(known: Sequence[str], wanted: Columns, shown: str) -> list[str]:
    """Returns the names of the path's column, and of the label's if there is one.

    Raises:
        DataError: if a column is absent, with the nearest names; or if a name occurs twice.
    """
    path, label = wanted.path or PATH_COLUMN, wanted.label or LABEL_COLUMN
    chosen = [path, label] if wanted.label or label in known else [path]
    for name, option in zip(chosen, ("path", "label"), strict=False):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}" if near else f"it has {some_of(list(known))}"
            raise DataError(f"{shown} has no column {name!r} ({hint}); name another as {shown},{option}=COLUMN")
        if known.count(name) > 1:
            raise DataError(f"{shown} has {known.count(name)} columns {name!r}; rename all but one")
    return chosen


def _packed(
    paths: list[str], labels: list[Label] | None, root: Path, shown: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Checks paths and labels, and returns the arrays of a `TableListing` and what is not an array."""
    _check_paths(paths, root, shown)
    numbers, label_names = np.full(len(paths), NO_LABEL, np.int32), None
    if labels is not None:
        numbers, label_names = encode_labels(labels, paths.__getitem__, shown)
    first: dict[str, int] = {}
    repeated = [i for i, path in enumerate(paths) if first.setdefault(path, i) != i]
    if differing := [paths[i] for i in repeated if numbers[first[paths[i]]] != numbers[i]]:
        raise DataError(
            f"{shown} lists {len(differing)} paths again with another label: {some_of(differing)}; keep one label for each"
        )
    parts = [os.fsencode(path) for path in paths]
    arrays = {
        "names": np.frombuffer(b"".join(parts), np.uint8),
        "name_ends": narrow(np.cumsum([len(part) for part in parts], dtype=np.int64)),
        "labels": numbers,
    }
    about = {
        "label_names": None if label_names is None else [printable(name) for name in label_names],
        "has_labels": labels is not None,
        "num_repeated": len(repeated),
        "repeated": [printable(paths[i]) for i in repeated[:3]],
    }
    return arrays, about


def _check_paths(paths: Sequence[str], root: Path, shown: str) -> None:
    """Looks all files up; raises DataError if some are missing."""

    def missing_at(folder: str | Path) -> Callable[[range], list[int]]:
        return lambda places: [i for i in places if not os.path.isfile(os.path.join(folder, paths[i]))]

    chunks = [range(at, min(at + 1024, len(paths))) for at in range(0, len(paths), 1024)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        missing = [i for found in pool.map(missing_at(root), chunks) for i in found]
    if missing:
        hint = f"relative paths begin at {printable(str(root))}: name another folder as {shown},root=FOLDER"
        if not missing_at("")(range(missing[0], missing[0] + 1)):
            hint = f"the first one is there from the current folder: name {shown},root=."
        raise DataError(
            f"{shown}: {len(missing)} of {len(paths)} paths are not files: {some_of([paths[i] for i in missing])}; {hint}, or "
            "remove these entries"
        )
