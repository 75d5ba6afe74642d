"""The listing of a folder: read with several threads, and kept in the cache folder as a file that all processes map.

A kept listing is used as long as no folder below the root has changed: each one's inode and times are compared. Times alone can
deceive, so a listing is also refused if a folder changed less than two seconds before it was read: a file that is added
within the tick of the file system's clock leaves the same time. The time of the inode's last change (ctime) shows a folder
whose modification time was set back, as rsync and tar do.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mae_et.data.decoding import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS
from mae_et.data.sources.cache import cache_folder, cached_path, locked, replacing, warn_not_kept
from mae_et.data.sources.listing import NO_LABEL, LeftOut, PackedNames, narrow, side_reason
from mae_et.data.sources.shard_names import is_shard_name
from mae_et.errors import DataError, printable
from mae_et.storage.array_file import map_arrays, write_arrays

log = logging.getLogger(__name__)

KEPT_FROM = 10_000  # images: smaller folders are listed each time, in milliseconds
_VERSION = 1
_NUM_THREADS = 16  # hide the latency of network file systems
_CLOCK_TICK = 2 * 10**9  # ns, of the coarsest file systems
_Times = tuple[int, int, int]  # inode, modification and change of a folder
_NEVER: _Times = (-1, -1, -1)  # of a folder that has to be read each time


class FolderListing:
    """The images below a folder, in the order of torchvision's ImageFolder.

    Attributes:
        class_names: the first-level folders, sorted.
        labels: [N] int32, the number of each image's first-level folder; NO_LABEL in the root itself.
        left_out: what is not read.
        shards: tar shards among it.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        self.labels = arrays["labels"]
        self.class_names: list[str] = list(about["class_names"])
        self.left_out = LeftOut.from_list(about["left_out"])
        self.shards: list[str] = list(about["shards"])
        self._folders = PackedNames(arrays["folders"], arrays["folder_ends"])
        self._starts = arrays["folder_starts"]  # first image of each folder, and the number of images
        self._names = PackedNames(arrays["names"], arrays["name_ends"])

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> str:
        """Returns the path of an image below the root."""
        name = self._names[index]
        folder = self._folders[int(np.searchsorted(self._starts, index, "right")) - 1]
        return f"{folder}/{name}" if folder else name

    def folders(self) -> Iterator[tuple[str, int]]:
        """Yields the folders with images and their numbers of images."""
        counts = np.diff(self._starts)
        return ((self._folders[i], int(counts[i])) for i in range(len(counts)))


def list_folder(root: Path) -> FolderListing:
    """Lists a folder, or maps the listing that the cache folder has.

    Of the processes of a machine one lists while the others wait. A listing that cannot be kept is a warning.

    Raises:
        DataError: if a folder cannot be read.
    """
    start = time.time_ns()
    path = cached_path(root.resolve().name, f"{root.resolve()}", ".listing")
    if (kept := _kept(path, root, start)) is not None:
        return kept
    if (scan := _scan(root, KEPT_FROM)) is not None:
        return FolderListing(*scan.packed())
    shown = printable(str(root))
    with locked(path, f"lists {shown}"):
        if (kept := _kept(path, root, start)) is not None:
            return kept
        log.info("listing %s; the listing is kept in %s", shown, cache_folder())
        scanned_at = time.time_ns()
        scan = _scan(root)
        assert scan is not None
        arrays, about = scan.packed()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                write_arrays(file, arrays, {**about, "scanned_at": scanned_at})
            arrays, about = map_arrays(path)
        except OSError as error:
            warn_not_kept(f"the listing of {shown}", error)
        log.info("listed %s: %d images in %.1f s", shown, len(arrays["labels"]), (time.time_ns() - scanned_at) / 1e9)
        return FolderListing(arrays, about)


def _kept(path: Path, root: Path, start: int) -> FolderListing | None:
    """Returns the kept listing if it shows the folder as it is now.

    Args:
        path: of the listing.
        root: the folder.
        start: when this process began, ns. A listing that another process made since then is as new as its own would be.
    """
    try:
        arrays, about = map_arrays(path)
        if about["version"] != _VERSION:
            return None
        listing = FolderListing(arrays, about)
        if about["scanned_at"] >= start:
            return listing
        folders = PackedNames(arrays["visited"], arrays["visited_ends"])
        times = arrays["times"].reshape(-1, 3)
        inodes, modified, changed = times.T
        latest = about["scanned_at"] - _CLOCK_TICK
        # A modification time may be set to any value, also one in the future.
        is_fresh = (changed > latest) | ((modified > latest) & (modified <= about["scanned_at"]))
        if (inodes < 0).any() or is_fresh.any():
            return None
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            chunks = (range(at, min(at + 256, len(folders))) for at in range(0, len(folders), 256))
            found = pool.map(lambda chunk: [_times(os.stat(root / folders[i])) for i in chunk], chunks)
            same = all(tuple(row) == now for row, now in zip(times.tolist(), itertools.chain(*found), strict=True))
        return listing if same else None
    # What is missing, cut off or foreign is made again.
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _times(status: os.stat_result) -> _Times:
    return (status.st_ino & (2**63 - 1), status.st_mtime_ns, status.st_ctime_ns)


@dataclass
class _Scan:
    """What is below a folder."""

    images: dict[str, bytes] = field(default_factory=dict)  # folder -> sorted names of its images, joined by NUL
    arrays: dict[str, bytes] = field(default_factory=dict)  # the same of files with ARRAY_EXTENSIONS
    top_folders: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    shards: list[str] = field(default_factory=list)
    times: dict[str, _Times] = field(default_factory=dict)

    def packed(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns the arrays of a FolderListing, what identifies the folder's state, and what is not an array."""
        class_of = {name: index for index, name in enumerate(sorted(self.top_folders))}
        folders = sorted(self.images, key=lambda folder: (folder.split("/")[0], folder))
        lengths, counts, blob = [], [], []
        for folder in folders:
            names = self.images[folder].split(b"\0")
            counts.append(len(names))
            lengths.append(np.fromiter(map(len, names), np.uint32, len(names)))
            blob.append(b"".join(names))
        labels = np.array([class_of.get(folder.split("/")[0], NO_LABEL) for folder in folders], np.int32)
        arrays = {
            "names": np.frombuffer(b"".join(blob), np.uint8),
            "name_ends": narrow(np.cumsum(np.concatenate([np.empty(0, np.uint32), *lengths]), dtype=np.int64)),
            "labels": np.repeat(labels, counts),
            "folder_starts": np.cumsum([0, *counts], dtype=np.int64),
            **_packed("folders", "folder_ends", folders),
            **_packed("visited", "visited_ends", list(self.times)),
            "times": np.array(list(self.times.values()), np.int64).reshape(-1),
        }
        about = {
            "version": _VERSION,
            "class_names": list(class_of),
            "left_out": self.left_out.to_list(),
            "shards": self.shards,
        }
        return arrays, about


def _packed(names_key: str, ends_key: str, names: list[str]) -> dict[str, np.ndarray]:
    parts = [os.fsencode(name) for name in names]
    return {
        names_key: np.frombuffer(b"".join(parts), np.uint8),
        ends_key: np.cumsum([len(part) for part in parts], dtype=np.int64),
    }


@dataclass
class _Waiting:
    """A folder that is still to be read, and the identities of those above it."""

    path: str
    above: tuple[tuple[int, int], ...] = ()


def _scan(root: Path, max_images: int | None = None) -> _Scan | None:
    """Lists a folder level by level.

    Args:
        root: the folder.
        max_images: None is returned once more images than this are found; None: no limit.
    """
    scan, num_images = _Scan(), 0
    level = [_Waiting("")]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        while level:
            deeper: list[_Waiting] = []
            for at in range(0, len(level), 4 * _NUM_THREADS):
                for part, below in pool.map(lambda folder: _scan_one(root, folder), level[at : at + 4 * _NUM_THREADS]):
                    scan.images |= part.images
                    scan.arrays |= part.arrays
                    scan.top_folders += part.top_folders
                    scan.left_out.update(part.left_out)
                    scan.shards += part.shards
                    scan.times |= part.times
                    deeper += below
                    num_images += sum(
                        names.count(b"\0") + 1 for found in (part.images, part.arrays) for names in found.values()
                    )
                if max_images is not None and num_images > max_images:
                    return None
            level = deeper
    if not scan.images:
        scan.images = scan.arrays
    else:
        for folder, names in scan.arrays.items():
            for name in names.split(b"\0"):
                scan.left_out.add_file(f"{folder}/{os.fsdecode(name)}" if folder else os.fsdecode(name))
    return scan


def _scan_one(root: Path, waiting: _Waiting) -> tuple[_Scan, list[_Waiting]]:
    """Lists one folder without those below it, which are returned."""
    folder, part, below = waiting.path, _Scan(), []
    images, arrays = [], []
    try:
        status = os.stat(root / folder)
        identity = (status.st_dev, status.st_ino)
        if identity in waiting.above:
            part.left_out.add("links back into a folder that holds them", [folder], is_loss=False)
            return part, []
        part.times[folder] = _times(status)
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if reason := side_reason(entry.name):
                    part.left_out.add(reason, [path], is_loss=False)
                elif _is_folder(entry):
                    below.append(_Waiting(path, (*waiting.above, identity)))
                    if not folder:
                        part.top_folders.append(entry.name)
                elif _is_special(entry):
                    part.left_out.add("entries that are not regular files (FIFO, socket, device)", [path], is_loss=True)
                elif "." in entry.name and entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
                    images.append(os.fsencode(entry.name))
                elif "." in entry.name and entry.name.rpartition(".")[2].lower() in ARRAY_EXTENSIONS:
                    arrays.append(os.fsencode(entry.name))
                else:
                    part.left_out.add_file(path)
                    if entry.is_symlink() and not os.path.exists(entry.path):
                        part.times[folder] = _NEVER  # a folder that appears behind a broken link changes no time here
                    if is_shard_name(path):
                        part.shards.append(path)
    except OSError as error:
        raise DataError(
            f"{printable(str(root / folder))} cannot be read: {error.strerror}; correct its permissions or move it away"
        ) from error
    if images:
        part.images[folder] = b"\0".join(sorted(images))
    if arrays:
        part.arrays[folder] = b"\0".join(sorted(arrays))
    return part, below


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Tells whether an entry that is not a folder exists and is not a regular file."""
    try:
        return not entry.is_file() and not (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a link to itself
        return False
