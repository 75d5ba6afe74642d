"""How many loader processes a run needs, measured while it runs: the time to prepare a batch over the time to use it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator

from mae_et.data.buffers import Batch
from mae_et.process import available_cores

log = logging.getLogger(__name__)

SKIPPED_BATCHES = 20  # at the beginning of each stage, where caches and libraries warm up
MEASURED_BATCHES = 100


class MeasuredBatches:
    """Passes the batches of loader processes on, and logs once for each side of the images how many processes keep up.

    Args:
        batches: of the loader.
        num_workers: its processes.
        num_local_processes: training processes of this machine, which share its cores.
    """

    def __init__(self, batches: Iterable[Batch], num_workers: int, num_local_processes: int) -> None:
        self.loader, self.num_workers, self.num_local_processes = batches, num_workers, num_local_processes

    def __iter__(self) -> Iterator[Batch]:
        self.batches = iter(self.loader)
        self.side, self.num_seen, self.returned = 0, 0, time.perf_counter()
        self.preparing = self.using = 0.0  # seconds of a loader process, and of the consumer
        return self

    def __next__(self) -> Batch:
        asked = time.perf_counter()
        batch = next(self.batches)
        if batch.images.shape[-1] != self.side:
            self.side, self.num_seen, self.preparing, self.using = batch.images.shape[-1], 0, 0.0, 0.0
        self.num_seen += 1
        if self.num_seen > SKIPPED_BATCHES:
            self.preparing += batch.seconds
            self.using += asked - self.returned
        if self.num_seen == SKIPPED_BATCHES + MEASURED_BATCHES:
            self._report()
        self.returned = time.perf_counter()
        return batch

    def _report(self) -> None:
        needed = math.ceil(self.preparing / max(self.using, 1e-9))
        milliseconds = [1e3 * seconds / MEASURED_BATCHES for seconds in (self.preparing, self.using)]
        text = (
            f"images of {self.side} px: a loader process prepares a batch in {milliseconds[0]:.3g} ms, and the run uses it in "
            f"{milliseconds[1]:.3g} ms, so {needed} loader processes keep up"
        )
        share = available_cores() // self.num_local_processes
        if needed <= self.num_workers:
            log.info("%s (%d are at work)", text, self.num_workers)
        elif needed <= share:
            log.warning("%s, but %d are at work; set data.num_workers=%d", text, self.num_workers, needed)
        else:
            log.warning(
                "%s, but %d are at work and each training process has %d cores: see docs/guides/loading.md",
                text, self.num_workers, share,
            )  # fmt: skip

    def _shutdown_workers(self) -> None:
        """Ends the loader's processes, as a DataLoader's iterator does; see `stream.reading`."""
        if hasattr(self.batches, "_shutdown_workers"):
            self.batches._shutdown_workers()
