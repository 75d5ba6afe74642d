"""Shared parts of the sources that read files: compact name lists, counts of what is left out, hints for a wrong path."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_et.errors import DataError, printable

NO_LABEL = -1
_NUM_EXAMPLES = 3

# Folders that storage devices and operating systems put beside the user's files. Compared without case.
_SIDE_FOLDERS = frozenset(
    {
        "__macosx", "@eadir", "@tmp", "@sharebin", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot",
        "$recycle.bin", "lost+found", "system volume information", "found.000",
        "network trash folder", "temporary items", "thumbs.db", "desktop.ini",
    }
)  # fmt: skip

# Images that are not read: losing them silently would lose data, unlike losing a text file.
_OTHER_IMAGE_KINDS = frozenset(
    {
        "avif", "avifs", "jp2", "j2k", "jpx", "jpf", "j2c", "jpc", "heic", "heif", "jxl", "jxr", "hdr", "exr", "pfm", "pam",
        "tga", "ico", "cur", "pcx", "psd", "xcf", "svg", "eps", "mpo", "bpg", "qoi", "dds", "fit", "fits", "sgi", "ras",
        "dcm", "dicom", "nii", "npy", "npz", "mat", "h5", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "raw",
    }
)  # fmt: skip


class PackedNames:
    """Names in two flat buffers: their bytes [b] uint8 one after the other, and where each name ends [n]."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        self._blob, self._ends = blob, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._blob[start : int(self._ends[index])].tobytes())


def narrow(numbers: np.ndarray) -> np.ndarray:
    """Returns numbers >= 0 as uint32 if all of them fit, otherwise as int64."""
    return numbers.astype(np.uint32 if numbers.max(initial=0) < 2**32 else np.int64)


@dataclass(frozen=True)
class LeftOutGroup:
    """Entries that are left out for one reason."""

    count: int
    examples: tuple[str, ...]  # the first names, printable
    is_loss: bool  # whether they are, or may be, images


class LeftOut:
    """Counts what a source does not read, by reason."""

    def __init__(self) -> None:
        self._groups: dict[str, LeftOutGroup] = {}

    def __iter__(self) -> Iterator[tuple[str, LeftOutGroup]]:
        return iter(sorted(self._groups.items()))

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, reason: str, names: Sequence[str], is_loss: bool, count: int | None = None) -> None:
        """Counts entries. `count` is their number where `names` holds only the first ones."""
        old = self._groups.get(reason, LeftOutGroup(0, (), is_loss))
        examples = (*old.examples, *map(printable, names[:_NUM_EXAMPLES]))[:_NUM_EXAMPLES]
        count = len(names) if count is None else count
        self._groups[reason] = LeftOutGroup(old.count + count, examples, is_loss)

    def add_file(self, path: str) -> None:
        """Counts a file that is not an image, by its kind."""
        base = path.rpartition("/")[2]
        kind = base.rpartition(".")[2].lower() if "." in base else ""
        reason = f".{printable(kind[:20])} files" if kind else "files without a suffix"
        self.add(reason, [path], kind in _OTHER_IMAGE_KINDS)

    def update(self, other: LeftOut) -> None:
        """Adds the counts of another part of the same source."""
        for reason, group in other:
            self.add(reason, group.examples, group.is_loss, group.count)

    def describe(self, only_losses: bool = False) -> str:
        """Returns one line: the count of each reason with an example; empty if there is nothing."""
        return "; ".join(
            f"{group.count} {reason} (e.g. {group.examples[0]})"
            for reason, group in self
            if group.is_loss or not only_losses
        )

    def to_list(self) -> list[tuple[str, int, list[str], bool]]:
        """Returns the counts for JSON; `from_list` is the inverse."""
        return [(reason, group.count, list(group.examples), group.is_loss) for reason, group in self]

    @classmethod
    def from_list(cls, rows: Iterable[tuple[str, int, list[str], bool]]) -> LeftOut:
        left_out = cls()
        for reason, count, examples, is_loss in rows:
            left_out.add(reason, examples, is_loss, count)
        return left_out


def side_reason(name: str) -> str | None:
    """Returns why a file or folder of this name is never read, or None: hidden, or made by the system it lies on."""
    if name.startswith("."):
        return "hidden entries"
    return f"{name} entries" if name.lower() in _SIDE_FOLDERS else None


def nearest_folder(path: Path) -> str:
    """Says what is in the closest folder above a path that does not exist."""
    missing = path.absolute()
    while not os.path.isdir(missing.parent):
        missing = missing.parent
    parent = missing.parent
    lacks = f"{printable(str(missing))} does not exist either; " if missing != path.absolute() else ""
    try:
        beside = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        return f"{printable(str(parent))} cannot be listed: {error.strerror or error}"
    listed = ", ".join(map(printable, beside[:10])) or "nothing"
    return f"{lacks}{printable(str(parent))} holds: {listed}{', ...' if len(beside) > 10 else ''}"


def some_of(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    if not names:
        return "none"
    return ", ".join(map(printable, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_class_names(path: Path) -> list[str]:
    """Reads one class name per line, in the order of the class indices.

    Raises:
        DataError: if the file cannot be read, is not UTF-8, or has an empty line.
    """
    shown = printable(str(path))
    try:
        return parse_class_names(path.read_bytes(), shown)
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}") from error


def parse_class_names(content: bytes, shown: str) -> list[str]:
    """Returns the names in the content of such a file; `shown` is its name for messages."""
    try:
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{shown} is not UTF-8: byte {error.object[error.start]:#04x} at position {error.start}; save the file as UTF-8"
        ) from error
    names = [printable(line.strip()) for line in lines]
    if "" in names:
        raise DataError(
            f"{shown} has an empty line {names.index('') + 1}; line n names class n, so remove that line or fill it"
        )
    return names
