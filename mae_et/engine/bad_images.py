"""Counts and names the unreadable images of a run, and stops it when there are too many."""

from __future__ import annotations

import logging
from collections.abc import Callable

from mae_et.data.buffers import Batch
from mae_et.engine.distributed import World
from mae_et.engine.progress import Progress
from mae_et.errors import DataError

log = logging.getLogger(__name__)

MAX_NAMED = 20  # images that are named one by one; all are counted


class BadImages:
    """The unreadable images that the loaders of all processes met.

    Args:
        progress: its `bad_images` is updated, so that a checkpoint holds them.
        world: the processes share what they met; the main one names it.
        dataset_size: for the message.
        max_bad_images: more than this stop the run.
        image_name: index -> path or name, for messages.
    """

    def __init__(
        self, progress: Progress, world: World, dataset_size: int, max_bad_images: int, image_name: Callable[[int], str]
    ) -> None:
        self.progress, self.world = progress, world
        self.dataset_size, self.max_bad_images, self.image_name = dataset_size, max_bad_images, image_name
        self.new: dict[int, str] = {}  # met by this process since the last `share`

    def add(self, batch: Batch, num_wanted: int) -> None:
        """Notes the unreadable images of a micro batch.

        Args:
            batch: as the loader made it.
            num_wanted: images that it should hold.
        Raises:
            DataError: if the loader found no readable image to put in place of one.
        """
        self.new.update({bad.index: bad.reason for bad in batch.bad_images})
        if len(batch.images) < num_wanted:
            first = "; ".join(f"{self.image_name(bad.index)}: {bad.reason}" for bad in batch.bad_images[:3])
            raise DataError(
                f"{len(batch.bad_images)} images in a row are unreadable, the first: {first}. Repair or remove them; "
                "`mae-et stats` lists all of them"
            )

    def share(self) -> None:
        """Collects what all processes met; a collective call. The main process names the new ones.

        Raises:
            DataError: if there are too many.
        """
        known = self.progress.bad_images
        for met in self.world.gather(self.new):
            for index, reason in met.items():
                if index not in known and self.world.is_main and len(known) < MAX_NAMED:
                    log.warning("unreadable image, replaced by another: %s: %s", self.image_name(index), reason)
                known.setdefault(index, reason)
        self.new = {}
        if len(known) > self.max_bad_images:
            index, reason = list(known.items())[-1]
            raise DataError(
                f"{len(known)} unreadable images were met so far, and data.max_bad_fraction allows {self.max_bad_images} of "
                f"{self.dataset_size}; the last: {self.image_name(index)}: {reason}. Repair or remove them, or raise "
                "data.max_bad_fraction"
            )
