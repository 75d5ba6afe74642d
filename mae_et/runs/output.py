"""Output folders of commands that write many files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from mae_et.errors import UserError


def open_output(folder: Path, overwrite: bool, owned: Sequence[str]) -> None:
    """Makes a folder for results.

    Args:
        folder: that results are written to.
        overwrite: remove the results of an earlier call; other files stay.
        owned: names of the files and folders that the caller writes.
    Raises:
        UserError: if the folder is a file, or is not empty and overwrite is false.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{folder} is not empty: choose another --out, or --overwrite to replace earlier results in it")
    folder.mkdir(parents=True, exist_ok=True)
    for name in owned:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def picture_name(number: int, name: str) -> str:
    """Returns the name of the PNG file of an image: unique by its number, readable by the image's name."""
    stem = re.sub(r"[^\w.-]+", "_", Path(name).stem)[:80]
    return f"{number:05d}_{stem}.png"
