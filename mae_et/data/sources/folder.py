"""Images below a folder, listed in the order of torchvision's ImageFolder."""

from __future__ import annotations

import logging
import os
import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mae_et.data.decoding import IMAGE_EXTENSIONS, decode_image, read_file
from mae_et.data.sources.listing import NO_LABEL, PackedNames
from mae_et.data.sources.shards import is_shard_name
from mae_et.errors import DataError

logger = logging.getLogger(__name__)


class FolderSource:
    """Images below a folder, in the order of torchvision's ImageFolder.

    Hidden entries and `__MACOSX` are skipped. Links to folders are followed, except back into a folder they lie in; a
    link to a file that is gone counts as an image, and as a bad one when it is read, so that a data set that shrank is
    noticed. If every image lies below a first-level subfolder, these subfolders, sorted, are the classes (one that is
    empty keeps its number).
    """

    labels: Sequence[int] | None
    class_names: Sequence[str] | None
    why_no_labels = ""

    def __init__(self, root: str | Path, num_channels: int = 3) -> None:
        self.root = Path(root)
        self.num_channels = num_channels
        found, top_folders, others = _scan_folder(self.root)
        if not found:
            raise DataError(_nothing_found(self.root, others))
        class_of = {name: index for index, name in enumerate(top_folders)}
        blob, lengths, labels = bytearray(), array("q"), array("q")
        for folder in sorted(found, key=lambda folder: (folder.split("/")[0], folder)):
            prefix = os.fsencode(f"{folder}/") if folder else b""
            names = [prefix + name for name in found[folder].split(b"\0")]
            blob += b"".join(names)
            lengths.extend(map(len, names))
            labels.extend([class_of.get(folder.split("/")[0], NO_LABEL)] * len(names))
        self._names = PackedNames(bytes(blob), np.cumsum(lengths, dtype=np.int64))
        self.labels, self.class_names = labels, top_folders
        if "" in found:
            self.labels = self.class_names = None
            self.why_no_labels = (
                f"the classes are the first-level subfolders, but {labels.count(NO_LABEL)} images lie in the folder "
                f"itself, e.g. {self._names[0]}; move each into a subfolder named after its class"
            )
        elif empty := sorted(set(top_folders) - {folder.split("/")[0] for folder in found}):
            logger.warning("%s: %d class folders hold no image: %s", self.root, len(empty), ", ".join(empty[:10]))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.root}/{self._names[index]}"

    def read(self, index: int) -> bytes:
        return read_file(self.name(index))

    def load(self, index: int) -> Image.Image:
        return decode_image(self.read(index), self.num_channels)


def _scan_folder(root: Path) -> tuple[dict[str, bytes], list[str], list[str]]:
    """Folder, relative to root -> its images' names joined by NUL; the first-level folders; the other files' paths."""
    found: dict[str, bytes] = {}
    top_folders: list[str] = []
    others: list[str] = []
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while waiting:
        folder, above = waiting.pop()
        images: list[bytes] = []
        try:
            status = os.stat(root / folder)
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                logger.warning("%s is a link back into a folder that holds it; not followed", root / folder)
                continue
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if _is_folder(entry):
                        waiting.append((path, (*above, identity)))
                        if not folder:
                            top_folders.append(entry.name)
                    elif entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in entry.name:
                        images.append(os.fsencode(entry.name))
                    else:
                        others.append(path)
        except OSError as error:
            raise DataError(f"{root / folder} cannot be read ({error.strerror}); mend that or move it away") from error
        if images:
            found[folder] = b"\0".join(sorted(images))
    return found, sorted(top_folders), others


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _nothing_found(root: Path, others: list[str]) -> str:
    shards = sorted(path for path in others if is_shard_name(path))
    if shards:
        patterns = _patterns_for(f"{root}/{path}" for path in shards)
        return f"{root} holds tar shards and no images; name the shards: {' or '.join(patterns)}"
    kinds = sorted({Path(path).suffix.lower() or "without extension" for path in others})
    inside = f"its {len(others)} files are of other kinds ({', '.join(kinds[:8])})" if others else "it has no files"
    return f"{root} holds no images ({', '.join(IMAGE_EXTENSIONS)}): {inside}; name the folder where the images are"


def _patterns_for(paths: Iterable[str]) -> list[str]:
    """The brace patterns that together name the given shards."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    singles: list[str] = []
    for path in paths:
        match = re.fullmatch(r"(.*?)(\d+)(\.tar|\.tar\.gz|\.tgz)", path, re.DOTALL)
        if match:
            groups.setdefault((match[1], match[3], len(match[2])), []).append(match[2])
        else:
            singles.append(path)
    for (prefix, suffix, _), numbers in groups.items():
        low, high = min(numbers), max(numbers)
        if len(numbers) == 1:
            singles.append(f"{prefix}{low}{suffix}")
        elif int(high) - int(low) + 1 == len(numbers):
            singles.append(f"{prefix}{{{low}..{high}}}{suffix}")
        else:
            singles.append(f"{prefix}*{suffix}")
    return sorted(singles)
