"""Images below a folder, listed in the order of torchvision's ImageFolder."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mae_et.data.arrays import ImageArray, decode
from mae_et.data.decoding import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS, Decoding, file_size, read_file
from mae_et.data.sources.folder_listing import FolderListing, list_folder
from mae_et.data.sources.listing import NO_LABEL, some_of
from mae_et.data.sources.shard_names import patterns_for
from mae_et.errors import DataError, printable

log = logging.getLogger(__name__)


class FolderSource:
    """Images below a folder, in the order of torchvision's ImageFolder.

    If every image lies below a first-level subfolder, these subfolders, sorted, are the classes. An empty one keeps its
    number. Files of `ARRAY_EXTENSIONS` are images only if there are no others. Links to folders are followed, except back
    into a folder that holds them. A link to a missing file is listed as an image, and is unreadable later: a data set that
    shrank is noticed. Hidden entries, folders of the operating system and files that are not images are left out and
    counted. `folder_listing.py` describes how the listing is kept.

    Args:
        root: the folder.
        decoding: how the images are decoded.
    Raises:
        DataError: if there are no images, or a folder cannot be read.
    """

    labels: np.ndarray | None  # [N] int32
    class_names: Sequence[str] | None
    why_no_labels = ""
    how_to_label = "move every image into a subfolder named after its class"

    def __init__(self, root: str | Path, decoding: Decoding = Decoding()) -> None:  # noqa: B008
        self.root = Path(root)
        self.decoding = decoding
        self._listing = list_folder(self.root)
        self.left_out = self._listing.left_out
        if not len(self):
            raise DataError(_nothing_found(self.root, self._listing))
        # Class names go into messages, JSON and text files, which cannot hold bytes that are not UTF-8.
        self.labels, self.class_names = self._listing.labels, [printable(name) for name in self._listing.class_names]
        with_images = {folder.split("/")[0] for folder, _ in self._listing.folders()}
        if "" in with_images:
            self.labels = self.class_names = None
            self.why_no_labels = (
                "the classes are the first-level subfolders, but "
                f"{np.count_nonzero(self._listing.labels == NO_LABEL)} images lie in the folder itself, e.g. "
                f"{printable(self._listing[0])}"
            )
        elif empty := sorted(set(self._listing.class_names) - with_images):
            log.warning("%s: %d class folders hold no image: %s", printable(str(root)), len(empty), some_of(empty))

    def __len__(self) -> int:
        return len(self._listing)

    def folders(self) -> Iterator[tuple[str, int]]:
        """Yields the folders with images, as paths below the root, and their numbers of images."""
        return self._listing.folders()

    def name(self, index: int) -> str:
        return printable(f"{self.root}/{self._listing[index]}")

    def key(self, index: int) -> str:
        return self._listing[index]

    def size(self, index: int) -> int | None:
        return file_size(f"{self.root}/{self._listing[index]}")

    def read(self, index: int) -> bytes:
        return read_file(f"{self.root}/{self._listing[index]}")

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Asks the system to read images from the disk."""
        if not hasattr(os, "posix_fadvise"):
            return
        for index in sorted(indices):  # the order of the names, which is often that of the disk
            with contextlib.suppress(OSError):  # `read` reports it
                descriptor = os.open(f"{self.root}/{self._listing[index]}", os.O_RDONLY | os.O_NONBLOCK)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)

    def load(self, index: int) -> Image.Image | ImageArray:
        return decode(f"{self.root}/{self._listing[index]}", self.decoding)


def _nothing_found(root: Path, listing: FolderListing) -> str:
    where = printable(str(root))
    if listing.shards:
        patterns = patterns_for(f"{root}/{path}" for path in sorted(listing.shards))
        return f"{where} holds tar shards and no images; name the shards: {' or '.join(map(printable, patterns))}"
    inside = f"it holds {listing.left_out.describe()}" if len(listing.left_out) else "it has no files"
    kinds = ", ".join(IMAGE_EXTENSIONS + ARRAY_EXTENSIONS)
    return f"{where} holds no images ({kinds}): {inside}; name the folder that holds the images"
