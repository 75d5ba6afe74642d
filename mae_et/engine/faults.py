"""Signals, and the failures of other processes and of the memory, as one clear message each."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator

import torch

from mae_et.errors import UserError

log = logging.getLogger(__name__)

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
# Words of the errors that gloo and NCCL raise when a peer is gone. torch has no common type for them.
_LOST_PEER = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "ProcessGroup", "Socket Timeout")


class StopRequest:
    """Whether a signal asked the run to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turns SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C into a request. A second Ctrl-C interrupts at once.

    Slurm sends SIGUSR1 before the end of the time limit, if a job asks for it (`--signal`).

    In a thread that is not the main one, signals cannot be caught: the request is never set there.
    """
    request = StopRequest()

    def ask(number: int, _frame: object) -> None:
        request.signal = signal.Signals(number)
        log.warning("%s: the run stops after this micro batch and saves", request.signal.name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def explained_failures(rank: int, working_on: Callable[[], str]) -> Iterator[None]:
    """Turns the death of a loader process, of another training process, and a full memory into a UserError.

    PyTorch raises the death of a loader process wherever the main thread is at that moment, so the whole training must
    run inside this block.

    Args:
        rank: of this process, for the message.
        working_on: describes the current micro batch, for the message.
    Raises:
        UserError: what failed and where to look.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        _explain(error, rank, working_on())
        raise


def _explain(error: BaseException, rank: int, working_on: str) -> None:
    text = str(error)
    first_line = text.splitlines()[0] if text else type(error).__name__
    if "DataLoader worker" in text:
        raise UserError(
            f"a loader process died ({first_line}). Usually the machine ran out of memory or of /dev/shm: lower "
            "data.num_workers, or give the job more memory"
        ) from error
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
    if out_of_memory:
        raise UserError(
            f"out of memory with {working_on}: lower batch.micro_batch_size (gradient accumulation keeps the global batch), or "
            "set run.activation_checkpointing = True"
        ) from error
    if isinstance(error, RuntimeError) and any(word in text for word in _LOST_PEER):
        raise UserError(
            f"process {rank} lost contact with another training process ({first_line[:200]}). That process failed first: "
            "look at its output for the cause. The last checkpoint is whole: start again with --resume"
        ) from error
