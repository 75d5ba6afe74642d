"""What the readers of folders and of shards share: long lists of names kept small, and a hint for a wrong path."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

NO_LABEL = -1


class PackedNames:
    """Names in two flat buffers: their bytes one after the other, and where each ends."""

    def __init__(self, blob: bytes, ends: np.ndarray) -> None:
        self._blob, self._ends = blob, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._blob[start : int(self._ends[index])])


def nearest_folder(path: Path) -> str:
    """Says what there is in the closest folder above a path that does not exist."""
    parent = path.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    beside = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    return f"{parent} holds: {', '.join(beside[:10]) or 'nothing'}{', ...' if len(beside) > 10 else ''}"
