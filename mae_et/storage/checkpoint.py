"""Checkpoints of a run: atomic saves, rotation, a seal over every byte, and memory-mapped loading."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mae_et.errors import CheckpointError
from mae_et.storage.atomic import atomic_path, first_line

_SEAL = b"sha256 of all before: "
_NAME = re.compile(r"step_(\d{8})\.pt$")


def save_checkpoint(state: Mapping[str, Any], folder: Path, step: int, keep: int) -> Path:
    """Writes `step_XXXXXXXX.pt` atomically, then removes all checkpoints but it and the `keep` - 1 before it.

    Raises:
        CheckpointError: if it cannot be written.
    """
    path = folder / f"step_{step:08d}.pt"
    with atomic_path(path, "run again with --resume") as temporary:
        torch.save(dict(state), temporary)
        _seal(temporary)
    saves = list_checkpoints(folder)
    here = saves.index(path)
    # Later steps exist only if they were damaged when the run resumed from an older checkpoint.
    for old in (*saves[: max(0, here + 1 - keep)], *saves[here + 1 :]):
        old.unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if _NAME.match(path.name))


def check_whole(path: str | Path) -> None:
    """Compares every byte of a file of torch.save with its seal, or without a seal with the checksums of the zip format.

    Raises:
        CheckpointError: if the file is missing, truncated, damaged or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    try:
        damage = _damage(path)
    except Exception:  # a damaged header can raise nearly any error
        raise CheckpointError(
            f"{path} is not a checkpoint, or is truncated ({path.stat().st_size} bytes): use another checkpoint of the "
            "run, or download the file again"
        ) from None
    if damage is not None:
        raise CheckpointError(f"{path} is damaged ({damage}): use another checkpoint of the run")


def load_checkpoint(path: str | Path, verify: bool = True) -> dict[str, Any]:
    """Loads a file of torch.save that holds a dict of tensors and plain values. No code of the file is run.

    The tensors are memory-mapped: processes of a machine share their pages. Copy them before the file can be removed.

    Args:
        path: of the file.
        verify: call `check_whole` first; False if another process did.
    Raises:
        CheckpointError: as `check_whole`, or if the file holds other objects.
    """
    path = Path(path)
    if verify:
        check_whole(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as tensors and plain values: {first_line(error)}. It was not written by this project, or "
            "it is damaged: use another checkpoint of the run"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dict of tensors")
    return state


def load_newest(
    folder: Path,
    warn: Callable[[str], Any],
    verify: bool = True,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> tuple[Path, dict[str, Any]]:
    """Loads the newest undamaged checkpoint of a folder. Damaged ones are reported through `warn` and skipped.

    With several processes, one process of each machine verifies, and all processes agree on the result.

    Args:
        folder: with the checkpoints.
        warn: takes a message.
        verify: whether this process reads the whole files to verify them.
        gather: returns the values of a variable in all processes; a collective call.
    Returns:
        The path and the memory-mapped content; see `load_checkpoint`.
    Raises:
        CheckpointError: if there is no undamaged checkpoint, or the processes see different files.
    """
    saves = list_checkpoints(folder)
    names = tuple(path.name for path in saves)
    if any(theirs != names for theirs in gather(names)):
        raise CheckpointError(
            f"the processes see different checkpoints in {folder}: the folder must be on a disk that all machines share"
        )
    for path in reversed(saves):
        fault = None
        if verify:
            try:
                check_whole(path)
            except CheckpointError as error:
                fault = str(error)
        faults = [found for found in gather(fault) if found is not None]
        if not faults:
            return path, load_checkpoint(path, verify=False)
        warn(f"{faults[0]}. Trying the checkpoint before it")
    if saves:
        raise CheckpointError(
            f"all {len(saves)} checkpoints in {folder} are damaged, so the run cannot resume: start it again with another "
            "--work-dir, or remove the folder and start without --resume"
        )
    raise CheckpointError(f"{folder} holds no checkpoint to resume from: start without --resume")


def _seal(path: Path) -> None:
    """Writes the SHA-256 of a zip file into its comment, because the checksums of the format do not cover its headers."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = _SEAL + b"0" * 64
    digest = _digest(path)
    with open(path, "rb+") as file:
        file.seek(-64, os.SEEK_END)
        file.write(digest)


def _damage(path: Path) -> str | None:
    with open(path, "rb") as file:
        file.seek(-64 - len(_SEAL), os.SEEK_END)
        tail = file.read()
    if tail.startswith(_SEAL):
        return None if tail[len(_SEAL) :] == _digest(path) else "its SHA-256 differs from the recorded one"
    with zipfile.ZipFile(path) as archive:
        if archive.comment.startswith(_SEAL[:4]):
            return "truncated: its seal is incomplete"
        bad = archive.testzip()
    return None if bad is None else f"wrong checksum of {bad}"


def _digest(path: Path) -> bytes:
    """Returns the SHA-256 of all but the last 64 bytes, in hexadecimal."""
    remaining, digest = path.stat().st_size - 64, hashlib.sha256()
    with open(path, "rb") as file:
        while remaining:
            block = file.read(min(remaining, 2**24))
            digest.update(block)
            remaining -= len(block)
    return digest.hexdigest().encode()
