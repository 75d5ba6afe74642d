"""Turns errors of mmengine, mmdet, mmseg and torch that a user can fix into one message."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from mmengine.config import Config

from downstream.checks.overrides import explain_unknown_key
from mae_et.errors import DataError, UserError

# Parts of the messages of gloo and NCCL when a process at the other end is gone.
LOST_PROCESS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket Timeout",
    "Timed out waiting",
    "remote process exited",
    "NCCL communicator was aborted",
    "store->get",
)


@contextlib.contextmanager
def explained(config: Config) -> Iterator[None]:
    """Raises a UserError with its fix in place of what the libraries raise for a user's fault; other errors pass."""
    try:
        yield
    except (AssertionError, FileNotFoundError) as error:
        lines = str(error).strip().splitlines() or [""]
        message = lines[-1]  # the first lines may be a traceback of a loader process
        if isinstance(error, FileNotFoundError) or "failed to load image" in message:
            raise DataError(
                f"an image or mask cannot be read: {message}. Replace the file, or take it out of the data set"
            ) from error
        raise
    except TypeError as error:
        explanation = explain_unknown_key(config, error)
        if explanation is None:
            raise
        raise explanation from error
    except ValueError as error:
        if isinstance(error, UserError) or "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "BatchNorm cannot train on one image: set train_dataloader.batch_size to 2 or more, or use SyncBN with several GPUs"
        ) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"too little GPU memory ({str(error).splitlines()[0]}): lower train_dataloader.batch_size (learning rates follow), "
            "set model.backbone.activation_checkpointing=True, or use --amp"
        ) from error
    except RuntimeError as error:
        raise _of_processes(error) or error from error.__cause__


def _of_processes(error: RuntimeError) -> UserError | None:
    """Explains the end of another process of a run or of a loader process; None for other errors."""
    text = str(error)
    if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        return UserError(
            f"a loader process died ({text.splitlines()[0]}). Most often memory ran out: lower train_dataloader.num_workers or "
            "batch_size, check free memory and /dev/shm, then start again with --resume"
        )
    if any(part in text for part in LOST_PROCESS):
        line = next(line for line in text.splitlines() if any(part in line for part in LOST_PROCESS))
        return UserError(
            f"process of rank {os.environ.get('RANK', '?')} lost the connection to another process ({line.strip()[-160:]}). That "
            "process ended first: look for its error above, or in the kernel's log for a process killed for lack of memory. "
            "Start again with --resume"
        )
    return None
