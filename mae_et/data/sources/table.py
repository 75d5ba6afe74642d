"""Images that a list file or a table names, `FILE[,root=FOLDER][,path=COLUMN][,label=COLUMN]`.

    FILE.txt            `PATH`, `PATH NUMBER` or `PATH<tab>LABEL` in each line
    FILE.csv, FILE.tsv  a header, and columns `path` and `label` (optional) or those that are named
    FILE.parquet        likewise; reading it needs pyarrow

Relative paths begin at the folder of FILE, or at root. Labels are numbers from 0 or names. The classes are the sorted names, or
the lines of a `classes.txt` beside FILE: line n (from 0) names number n.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mae_et.data.decoding import Decoding
from mae_et.data.sources.files import FileSource
from mae_et.data.sources.listing import NO_LABEL, LeftOut, nearest_folder, read_class_names, some_of
from mae_et.data.sources.table_listing import LABEL_COLUMN, Columns, list_table
from mae_et.errors import DataError, printable

log = logging.getLogger(__name__)

TABLE_SUFFIXES = (".txt", ".csv", ".tsv", ".parquet")
GRAMMAR = "FILE[,root=FOLDER][,path=COLUMN][,label=COLUMN]"
_TABLE = re.compile(r"(.*?\.(?:txt|csv|tsv|parquet))((?:,\w+=[^,]*)*)", re.IGNORECASE | re.DOTALL)
_OPTIONS = ("root", "path", "label")


class TableSource(FileSource):
    """Images that a list file or a table names, in its order. The docstring of the module has the forms.

    A path that occurs several times is an image each time; it is counted and logged.

    Args:
        file: the list file or table.
        decoding: how the images are decoded.
        root: that relative paths begin at; None: the folder of the file.
        columns: of a table.
    Raises:
        DataError: if the file cannot be read, a column or an image's file is missing, or labels are faulty.
    """

    labels: Sequence[int] | np.ndarray | None
    class_names: Sequence[str] | None
    why_no_labels = ""

    def __init__(
        self,
        file: str | Path,
        decoding: Decoding = Decoding(),  # noqa: B008
        root: str | Path | None = None,
        columns: Columns = Columns(),  # noqa: B008
    ) -> None:
        self.file, self.decoding, self.left_out = Path(file), decoding, LeftOut()
        self.root = str(self.file.parent if root is None else Path(root).expanduser())
        self._listing = list_table(self.file, Path(self.root), columns)
        is_list = self.file.suffix.lower() == ".txt"
        self.how_to_label = "write a number or a tab and a name after each path" if is_list else "complete that column"
        if self.num_repeated:
            log.warning("%s: %s", printable(str(file)), self.repeated_text())
        self.labels, self.class_names = self._listing.labels, self._listing.label_names
        unlabelled = np.flatnonzero(self._listing.labels == NO_LABEL)
        if len(unlabelled):
            self.labels = self.class_names = None
            self.why_no_labels = (
                f"{len(unlabelled)} of {len(self)} entries have none, e.g. {self.name(int(unlabelled[0]))}"
                if self._listing.has_labels
                else "its lines are paths alone"
                if is_list
                else f"it has no column {LABEL_COLUMN!r}"
            )
        else:
            self._name_classes()

    def _name_classes(self) -> None:
        names_file = self.file.parent / "classes.txt"
        if not names_file.is_file() or names_file.resolve() == self.file.resolve():
            return
        listed, labels = read_class_names(names_file), self._listing.labels
        where = f"{printable(str(self.file))} and {printable(str(names_file))}"
        if self.class_names is None:
            if wrong := np.flatnonzero(labels >= len(listed)).tolist():
                examples = some_of([f"{labels[i]} of {self._listing.names[i]}" for i in wrong[:5]])
                raise DataError(
                    f"{where} do not fit: {len(wrong)} labels exceed the {len(listed)} classes, numbered from 0, e.g. "
                    f"{examples}; correct them, or complete or remove classes.txt"
                )
        else:
            places = {name: number for number, name in enumerate(listed)}
            if unknown := [name for name in self.class_names if name not in places]:
                near = difflib.get_close_matches(unknown[0], listed, n=1)
                raise DataError(
                    f"{where} do not fit: {len(unknown)} labels are not among its classes: {some_of(unknown)}"
                    f"{f' (did you mean {near[0]!r}?)' if near else ''}; correct them, or complete or remove classes.txt"
                )
            self.labels = np.array([places[name] for name in self.class_names], np.int32)[labels]
        self.class_names = listed

    @property
    def num_repeated(self) -> int:
        return self._listing.num_repeated

    def repeated_text(self) -> str:
        """Describes the paths that occur several times."""
        return (
            f"{self.num_repeated} of {len(self)} entries repeat the path of another, e.g. {some_of(self._listing.repeated)}; "
            "each is shown as an image of its own"
        )

    def __len__(self) -> int:
        return len(self._listing.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self._listing.names[index])

    def key(self, index: int) -> str:
        return self._listing.names[index]


def is_table(spec: str) -> bool:
    """Whether a text has the form of a list file or a table, also with options."""
    return _TABLE.fullmatch(spec) is not None


def parse_table(spec: str, decoding: Decoding) -> TableSource:
    """Opens what `FILE[,root=FOLDER][,path=COLUMN][,label=COLUMN]` names; raises DataError for other options."""
    match = _TABLE.fullmatch(spec)
    assert match is not None
    file, shown = match[1], printable(spec)
    if os.path.exists(spec):  # a name with commas
        return TableSource(spec, decoding)
    options = parse_options(match[2], _OPTIONS, f"{shown} is written {GRAMMAR}")
    if not os.path.isfile(file):
        raise DataError(f"{printable(file)} does not exist; {nearest_folder(Path(file))}")
    root, columns = options.get("root"), Columns(options.get("path"), options.get("label"))
    if file.lower().endswith(".txt") and any(columns):
        raise DataError(f"{shown}: a .txt list has no columns; remove path= and label=, or write a table as .csv")
    if root is not None and not os.path.isdir(os.path.expanduser(root)):
        raise DataError(f"{shown}: root={printable(root)} is not a folder; {nearest_folder(Path(root).expanduser())}")
    return TableSource(file, decoding, root, columns)


def parse_options(text: str, known: Sequence[str], grammar: str) -> dict[str, str]:
    """Reads `,KEY=VALUE,...`.

    Args:
        text: of the options.
        known: keys.
        grammar: of the whole, for the message.
    Raises:
        DataError: for an unknown key, or one without a value.
    """
    options: dict[str, str] = {}
    for word in text.split(",")[1:]:
        key, _, value = word.partition("=")
        if key not in known or not value:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}=?" if near and key not in known else ""
            raise DataError(f"{grammar}: {printable(word)!r} is no option with a value{hint}")
        options[key] = value
    return options
