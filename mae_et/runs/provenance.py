"""Describes where the numbers of a run come from: its machine, its memory and the weights that it started from."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import timm
import torch

import mae_et
from mae_et.errors import CheckpointError, UserError
from mae_et.runs.records import Environment, InitialWeights
from mae_et.storage.backbone import read_backbone
from mae_et.storage.weights import find_weights


def describe_environment(device: str, world_size: int) -> Environment:
    """Returns the command, the versions and the hardware of this process.

    Args:
        device: "cpu" or "cuda".
        world_size: number of processes.
    """
    on_gpu = device == "cuda"
    return Environment(
        command=sys.argv,
        mae_et=mae_et.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        timm=timm.__version__,
        numpy=np.__version__,
        mmdet=_version("onedl-mmdetection"),
        mmseg=_version("onedl-mmsegmentation"),
        platform=platform.platform(),
        processor=platform.processor() or platform.machine(),
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        cuda=torch.version.cuda if on_gpu else None,
        num_threads=torch.get_num_threads(),
        world_size=world_size,
    )


def describe_weights(path: str | Path | None) -> InitialWeights | None:
    """Returns the digests and the metadata of the weights that a run starts from.

    Args:
        path: a backbone file, the folder of a run, or a name such as "timm" that is neither; None: random weights.
    """
    if path is None:
        return None
    if Path(path).is_dir():
        with contextlib.suppress(CheckpointError):  # a resumed run may have lost the folder's files
            path = find_weights(path)
    if not Path(path).is_file():
        return InitialWeights(file=str(path), sha256=None, encoder_sha256=None, metadata={})
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**24):
            digest.update(block)
    try:
        metadata = read_backbone(path)[1]
    except UserError:  # only the library of the detector reads it
        metadata = {}
    encoder = metadata.get("encoder_sha256")
    return InitialWeights(file=str(path), sha256=digest.hexdigest(), encoder_sha256=encoder, metadata=metadata)


def peak_memory_mb() -> float:
    """Returns the peak memory of this process in MB (2^20 bytes): the GPU's if CUDA was used, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
