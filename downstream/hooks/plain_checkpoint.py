"""Writes checkpoints that `torch.load(weights_only=True)` reads, so that no pickle has to be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.registry import HOOKS

_HISTORY = "history_buffer"


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Turns what mmengine adds to a checkpoint into tensors, numbers, strings, lists and dicts, and back on loading."""

    priority = "LOWEST"  # after hooks that add to the checkpoint; listed last, so the last of its priority

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Converts everything but the model's state, which is plain."""
        for key in checkpoint.keys() - {"state_dict", "ema_state_dict"}:
            checkpoint[key] = to_plain(checkpoint[key])

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Restores the objects that mmengine expects."""
        if "message_hub" in checkpoint:
            hub = checkpoint["message_hub"]
            hub["log_scalars"] = {name: from_plain(value) for name, value in hub["log_scalars"].items()}
        if not runner.cfg.get("resume"):
            return
        meta, dataset = checkpoint.get("meta") or {}, runner.train_dataloader.dataset
        own = getattr(dataset, "metainfo", None)
        if own is not None and to_plain(own) == meta.get("dataset_meta"):
            meta["dataset_meta"] = own  # mmengine compares the pickled forms and warns of a difference


def to_plain(value: Any) -> Any:
    """Returns a value made of tensors, numbers, strings, lists, tuples and dicts alone; other objects become strings."""
    if value is None or isinstance(value, torch.Tensor) or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, HistoryBuffer):
        log, count = (torch.as_tensor(np.asarray(part)) for part in value.data)
        return {"type": _HISTORY, "log": log, "count": count, "max_length": value.max_length}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {to_plain(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(to_plain(item) for item in value)
    if isinstance(value, (list, set, frozenset)):
        return [to_plain(item) for item in value]
    return str(value)


def from_plain(value: Any) -> Any:
    """Undoes `to_plain` for a history; returns anything else as it is."""
    if isinstance(value, dict) and value.get("type") == _HISTORY:
        return HistoryBuffer(value["log"].tolist(), value["count"].tolist(), value["max_length"])
    return value
