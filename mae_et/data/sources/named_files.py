"""Images that a command line names: files, folders and glob patterns."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from mae_et.data.decoding import IMAGE_EXTENSIONS, Decoding
from mae_et.data.sources.files import FileSource
from mae_et.data.sources.folder import FolderSource
from mae_et.data.sources.listing import LeftOut, nearest_folder
from mae_et.errors import DataError, printable

log = logging.getLogger(__name__)


class NamedFiles(FileSource):
    """Image files in a given order, without labels.

    Args:
        paths: of the files.
        decoding: how the images are decoded.
    """

    labels: Sequence[int] | None = None
    class_names: Sequence[str] | None = None

    def __init__(self, paths: Sequence[str], decoding: Decoding = Decoding()) -> None:  # noqa: B008
        self.paths, self.decoding, self.left_out = list(paths), decoding, LeftOut()

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return self.paths[index]

    def key(self, index: int) -> str:
        return self.paths[index]


def open_files(words: Sequence[str], num_channels: int = 3) -> NamedFiles:
    """Opens the images that words of a command line name.

    A file named twice is used once, which is logged. Of the files that a pattern matches, those without the suffix of an
    image are left out and logged. A file that is named itself is always used.

    Args:
        words: files, folders (images at any depth) and glob patterns, in which ** stands for any depth.
        num_channels: 3 (RGB) or 1 (grey).
    Raises:
        DataError: if a word names no image.
    """
    paths: list[str] = []
    for word in words:
        paths += _files_of(os.path.expanduser(word))
    unique = list(dict.fromkeys(paths))
    if len(unique) < len(paths):
        log.info("%d images are named more than once; each is used once", len(paths) - len(unique))
    return NamedFiles(unique, Decoding(num_channels))


def _files_of(word: str) -> list[str]:
    shown = printable(word)
    if os.path.isdir(word):
        source = FolderSource(word)
        if len(source.left_out):
            log.info("%s: left out: %s", shown, source.left_out.describe())
        return [os.path.join(word, source.key(i)) for i in range(len(source))]
    if os.path.lexists(word):
        return [word]
    if not glob.has_magic(word):
        raise DataError(f"{shown} does not exist; {nearest_folder(Path(word))}")
    found: list[str] = []
    for match in sorted(glob.glob(word, recursive=True)):
        if not os.path.isdir(match):
            found.append(match)
        elif "**" not in word:  # a recursive pattern matches the files below a folder itself
            found += _files_of(match)
    images = [path for path in found if path.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
    if not images:
        others = f"; {len(found)} other files match" if found else ""
        raise DataError(f"the pattern {shown} matches no image{others}. {nearest_folder(Path(word))}")
    if len(images) < len(found):
        log.info("%s: left out %d files that are not images", shown, len(found) - len(images))
    return images
