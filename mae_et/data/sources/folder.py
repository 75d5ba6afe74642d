"""Images below a folder, listed in the order of torchvision's ImageFolder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mae_et.data.decoding import IMAGE_EXTENSIONS, Decoding
from mae_et.data.sources.files import FileSource
from mae_et.data.sources.folder_listing import FolderListing, list_folder
from mae_et.data.sources.listing import NO_LABEL, some_of
from mae_et.data.sources.shard_names import patterns_for
from mae_et.errors import DataError, printable

log = logging.getLogger(__name__)


class FolderSource(FileSource):
    """Images below a folder, in the order of torchvision's ImageFolder.

    If every image lies below a first-level subfolder, these subfolders, sorted, are the classes. An empty one keeps its
    number. Links to folders are followed, except back into a folder that holds them. A link to a missing file is listed
    as an image, and is unreadable later: a data set that shrank is noticed. Hidden entries, folders of the operating
    system and files that are not images are left out and counted. The docstring of `folder_listing.py` explains how the
    listing is kept.

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

    def path(self, index: int) -> str:
        return f"{self.root}/{self._listing[index]}"

    def key(self, index: int) -> str:
        return self._listing[index]


def _nothing_found(root: Path, listing: FolderListing) -> str:
    where = printable(str(root))
    if listing.shards:
        patterns = patterns_for(f"{root}/{path}" for path in sorted(listing.shards))
        return f"{where} holds tar shards and no images; name the shards: {' or '.join(map(printable, patterns))}"
    if {".arrow files", ".parquet files"} & {reason for reason, _ in listing.left_out}:
        return (
            f"{where} holds no images, but .arrow or .parquet files; name a Hugging Face data set as datasets:{where}"
        )
    inside = f"it holds {listing.left_out.describe()}" if len(listing.left_out) else "it has no files"
    return f"{where} holds no images ({', '.join(IMAGE_EXTENSIONS)}): {inside}; name the folder that holds the images"
