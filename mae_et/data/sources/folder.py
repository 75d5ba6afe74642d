"""Images below a folder, listed in the order of torchvision's ImageFolder."""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mae_et.data.decoding import IMAGE_EXTENSIONS, Decoding, decode_image, file_size, read_file
from mae_et.data.sources.listing import NO_LABEL, LeftOut, PackedNames, side_reason, some_of
from mae_et.data.sources.shard_names import is_shard_name, patterns_for
from mae_et.errors import DataError, printable

log = logging.getLogger(__name__)


class FolderSource:
    """Images below a folder, in the order of torchvision's ImageFolder.

    If every image lies below a first-level subfolder, these subfolders, sorted, are the classes. An empty one keeps its
    number. Links to folders are followed, except back into a folder that holds them. A link to a missing file is listed
    as an image, and is unreadable later: a data set that shrank is noticed. Hidden entries, folders of the operating
    system and files that are not images are left out and counted.

    Args:
        root: the folder.
        decoding: how the images are decoded.
    Raises:
        DataError: if there are no images, or a folder cannot be read.
    """

    labels: Sequence[int] | None
    class_names: Sequence[str] | None
    why_no_labels = ""
    how_to_label = "move every image into a subfolder named after its class"

    def __init__(self, root: str | Path, decoding: Decoding = Decoding()) -> None:  # noqa: B008
        self.root = Path(root)
        self.decoding = decoding
        found, top_folders, self.left_out, shards = _scan_folder(self.root)
        if not found:
            raise DataError(_nothing_found(self.root, self.left_out, shards))
        class_of = {name: index for index, name in enumerate(top_folders)}
        blob, lengths, labels = bytearray(), array("q"), array("q")
        for folder in sorted(found, key=lambda folder: (folder.split("/")[0], folder)):
            prefix = os.fsencode(f"{folder}/") if folder else b""
            names = [prefix + name for name in found[folder].split(b"\0")]
            blob += b"".join(names)
            lengths.extend(map(len, names))
            labels.extend([class_of.get(folder.split("/")[0], NO_LABEL)] * len(names))
        self._names = PackedNames(bytes(blob), np.cumsum(lengths, dtype=np.int64))
        # Class names go into messages, JSON and text files, which cannot hold bytes that are not UTF-8.
        self.labels, self.class_names = labels, [printable(name) for name in top_folders]
        if "" in found:
            self.labels = self.class_names = None
            self.why_no_labels = (
                f"the classes are the first-level subfolders, but {labels.count(NO_LABEL)} images lie in the folder "
                f"itself, e.g. {printable(self._names[0])}"
            )
        elif empty := sorted(set(top_folders) - {folder.split("/")[0] for folder in found}):
            log.warning("%s: %d class folders hold no image: %s", printable(str(root)), len(empty), some_of(empty))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return printable(f"{self.root}/{self._names[index]}")

    def key(self, index: int) -> str:
        return self._names[index]

    def size(self, index: int) -> int | None:
        return file_size(f"{self.root}/{self._names[index]}")

    def read(self, index: int) -> bytes:
        return read_file(f"{self.root}/{self._names[index]}")

    def load(self, index: int) -> Image.Image:
        return decode_image(self.read(index), *self.decoding)


def _scan_folder(root: Path) -> tuple[dict[str, bytes], list[str], LeftOut, list[str]]:
    """Lists a folder.

    Returns:
        The image names of each folder (its path below root) joined by NUL; the first-level folders, sorted; what is left
        out; the paths of tar shards among it.
    """
    found: dict[str, bytes] = {}
    top_folders: list[str] = []
    left_out = LeftOut()
    shards: list[str] = []
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while waiting:
        folder, above = waiting.pop()
        images: list[bytes] = []
        try:
            status = os.stat(root / folder)
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                left_out.add("links back into a folder that holds them", [folder], is_loss=False)
                continue
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if reason := side_reason(entry.name):
                        left_out.add(reason, [path], is_loss=False)
                    elif _is_folder(entry):
                        waiting.append((path, (*above, identity)))
                        if not folder:
                            top_folders.append(entry.name)
                    elif _is_special(entry):
                        left_out.add("entries that are not regular files (FIFO, socket, device)", [path], is_loss=True)
                    elif "." in entry.name and entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
                        images.append(os.fsencode(entry.name))
                    else:
                        left_out.add_file(path)
                        if is_shard_name(path):
                            shards.append(path)
        except OSError as error:
            raise DataError(
                f"{printable(str(root / folder))} cannot be read: {error.strerror}; correct its permissions or move it away"
            ) from error
        if images:
            found[folder] = b"\0".join(sorted(images))
    return found, sorted(top_folders), left_out, shards


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether an entry that is not a folder exists and is not a regular file."""
    try:
        return not entry.is_file() and not (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a link to itself
        return False


def _nothing_found(root: Path, left_out: LeftOut, shards: list[str]) -> str:
    where = printable(str(root))
    if shards:
        patterns = patterns_for(f"{root}/{path}" for path in sorted(shards))
        return f"{where} holds tar shards and no images; name the shards: {' or '.join(map(printable, patterns))}"
    inside = f"it holds {left_out.describe()}" if len(left_out) else "it has no files"
    return f"{where} holds no images ({', '.join(IMAGE_EXTENSIONS)}): {inside}; name the folder that holds the images"
