"""Writes shards in several processes. Each process writes one shard at a time, and all of them end with the main one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mae_et.errors import DataError

_POLL_SECONDS = 0.2

Job = TypeVar("Job")
Result = TypeVar("Result")


def write_in_processes(
    write: Callable[[Job, int, Callable[[], None]], Result],
    job: Job,
    numbers: Sequence[int],
    num_processes: int,
    progress: Callable[[int], Any],
) -> Iterator[tuple[int, Result]]:
    """Writes shards and yields (number, result) as they finish. If it ends early, the processes end after one image.

    Args:
        write: a function of a module, called with the job, the number of a shard and a function to call after each image.
        job: pickled once for each process.
        numbers: of the shards.
        num_processes: limit for the number of processes.
        progress: called repeatedly with the number of images handled since the last call.
    Raises:
        DataError: if a process was killed.
    """
    if not numbers:
        return
    context = multiprocessing.get_context("spawn")
    stop, handled = context.Event(), context.Value("q", 0)
    processes = min(num_processes, len(numbers))
    pool = ProcessPoolExecutor(processes, context, _start_process, (write, job, stop, handled))
    seen = 0
    try:
        futures = {pool.submit(_write, number): number for number in numbers}
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
            progress(handled.value - seen)
            seen = handled.value
            for future in finished:
                yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process was killed, perhaps because memory ran out; run the same command again with fewer --processes: "
            "finished shards are kept"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """The main process stopped the work."""


_process: tuple[Callable[..., Any], Any, Any, Any]  # function, job, stop event and counter of this process of the pool


def _start_process(*arguments: Any) -> None:
    global _process
    _process = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process with the main one. After a kill of that one, the pool would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write(number: int) -> Any:
    write, job, _, _ = _process
    return write(job, number, _image_handled)


def _image_handled() -> None:
    _, _, stop, handled = _process
    with handled.get_lock():
        handled.value += 1
    if stop.is_set():
        raise _Stopped
