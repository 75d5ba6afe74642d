"""Fits a config to the machine and to our classes: precision, SyncBN, process groups, data sets and metrics by name."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config, ConfigDict

from downstream.compat.operators import provide_operators
from mae_et.errors import UserError

log = logging.getLogger(__name__)
AMP_ONLY = ("loss_scale", "dtype", "use_fsdp")


def prepare(config: Config, launcher: str = "none", amp: bool = False) -> None:
    """Fits a config to this machine, in place; logs what it changes.

    Args:
        config: as read.
        launcher: "none", "pytorch", "slurm" or "mpi".
        amp: mixed precision, where there is a GPU; in float16, or in `optim_wrapper.dtype`.
    Raises:
        UserError: if bfloat16 is asked for with mmcv's compiled operators, which have none.
    """
    config.launcher = launcher
    cuda = torch.cuda.is_available()
    wrapper = config.get("optim_wrapper")
    if wrapper is not None:
        if amp:
            wrapper["type"] = "AmpOptimWrapper"
        if wrapper.get("type") == "AmpOptimWrapper":
            _set_precision(config, cuda)
    if not cuda and (count := replace_type(config.model, "SyncBN", "BN")):
        log.warning("no GPU: BN in place of SyncBN, in %d places", count)
    if config.get("default_scope") == "mmdet":
        _use_our_classes(config)
    if launcher == "pytorch" and not cuda:
        _start_gloo()
        config.env_cfg = ConfigDict(config.get("env_cfg") or {})
        config.env_cfg.dist_cfg = {"backend": "gloo"}
        config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None}


def _use_our_classes(config: Config) -> None:
    """Replaces mmdetection's COCO data set, COCO metric and test-time padding; see the classes for why."""
    import downstream.compat.padding
    import downstream.datasets.coco  # noqa: F401 (registers them)

    for name in ("train", "val", "test"):
        loader = config.get(f"{name}_dataloader")
        replace_type(loader, "CocoDataset", "CocoDatasetByNames")
        if name != "train":
            replace_type(loader, "Pad", "PadKeepingImageSize")
        replace_type(config.get(f"{name}_evaluator"), "CocoMetric", "CocoMetricByNames")
    replace_type(config.get("tta_pipeline"), "Pad", "PadKeepingImageSize")


def replace_type(node: Any, old: str, new: str) -> int:
    """Replaces a `type`, with or without mmdet's scope, wherever it stands below a node; returns how often."""
    count = 0
    if isinstance(node, dict):
        if node.get("type") in (old, f"mmdet.{old}"):
            node["type"], count = new, 1
        count += sum(replace_type(value, old, new) for value in node.values())
    elif isinstance(node, (list, tuple)):
        count += sum(replace_type(value, old, new) for value in node)
    return count


def _set_precision(config: Config, cuda: bool) -> None:
    wrapper = config.optim_wrapper
    if not cuda:
        log.warning("no GPU: float32 in place of mixed precision")
        wrapper["type"] = "OptimWrapper"
        for key in AMP_ONLY:
            wrapper.pop(key, None)
    elif wrapper.get("dtype") == "bfloat16":
        if config.get("default_scope") == "mmdet" and provide_operators() == "compiled":
            raise UserError(
                "optim_wrapper.dtype = 'bfloat16', which mmcv's compiled RoIAlign does not support: use 'float16', or install "
                "mmcv without its operators"
            )
        wrapper["loss_scale"] = {"enabled": False}  # its range is that of float32


def _start_gloo() -> None:
    """Joins the processes before mmengine does, which would ask for a CUDA device first."""
    if not torch.distributed.is_initialized():
        lacking = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if lacking:
            raise UserError(
                f"--launcher pytorch: {', '.join(lacking)} not set. Start with torchrun --nproc_per_node N tools/train.py ..."
            )
        torch.distributed.init_process_group("gloo")
