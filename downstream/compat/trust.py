"""Reads checkpoints of mmengine without running the code that a pickle may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer

from mae_et.errors import CheckpointError

# Plain values that mmengine's own checkpoints hold beside tensors. mmengine's own list also has `getattr`, which reaches
# any function, so it is not used.
SAFE = [
    HistoryBuffer,
    np.ndarray,
    np.dtype,
    np.ndarray.__reduce__(np.empty(0))[0],  # the two functions that rebuild arrays and numbers
    np.float64(0).__reduce__()[0],
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.uint8, np.uint32, np.bool_)),
]
_trusted = False


def trust_checkpoints(is_trusted: bool) -> None:
    """Lets pickles run code from now on in this process, or not; for `--trust-checkpoint`."""
    global _trusted
    _trusted = is_trusted


def load(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """Loads a file of torch.save; stands in for mmengine's function, which runs any pickle after a warning.

    Args:
        file: a path or an open file.
        map_location: as for torch.load.
        weights_only: not used: what is trusted decides.
    Raises:
        CheckpointError: if the file asks to run code and is not trusted, or is damaged.
    """
    name = file if isinstance(file, (str, Path)) else "the checkpoint"
    try:
        with torch.serialization.safe_globals(SAFE):
            return torch.load(file, map_location=map_location, weights_only=not _trusted)
    except pickle.UnpicklingError as error:
        line = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise CheckpointError(
            f"{name} cannot be read as plain tensors ({line}). It is damaged, or a pickle that runs code when it is loaded. "
            "If you trust where it comes from, add --trust-checkpoint"
        ) from error


def refuse_pickles() -> None:
    """Makes every load of mmengine refuse pickles that run code."""
    import mmengine.runner.checkpoint  # needs cv2, which the backbones do without

    mmengine.runner.checkpoint._safe_torch_load = load
