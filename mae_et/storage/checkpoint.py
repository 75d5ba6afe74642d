"""Checkpoints of a run: atomic saves, rotation, a seal over every byte, and memory-mapped loading.

A checkpoint is a file `step_XXXXXXXX.pt`, or under FSDP2 a folder `step_XXXXXXXX`: see sharded_checkpoint.py.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mae_et.errors import CheckpointError
from mae_et.storage.atomic import atomic_path, first_line
from mae_et.storage.sharded_checkpoint import check_sharded, is_sealed, read_values, read_whole, remove_sharded

_SEAL = b"sha256 of all before: "
_NAME = re.compile(r"step_(\d{8})(\.pt)?$")


def save_checkpoint(state: Mapping[str, Any], folder: Path, step: int, keep: int) -> Path:
    """Writes `step_XXXXXXXX.pt` atomically, then removes other checkpoints: see `remove_others`.

    Raises:
        CheckpointError: if it cannot be written.
    """
    path = folder / f"step_{step:08d}.pt"
    with atomic_path(path, "run again with --resume") as temporary:
        torch.save(dict(state), temporary)
        _seal(temporary)
    remove_others(path, keep)
    return path


def remove_others(path: Path, keep: int) -> None:
    """Removes all checkpoints beside `path` but it and the `keep` - 1 before it."""
    saves = list_checkpoints(path.parent)
    before = [save for save in saves if save.stem < path.stem]
    kept = {path, *before[max(0, len(before) + 1 - keep) :]}
    # Later steps, and the same step in another form, exist only if they were damaged when the run resumed from an older one.
    for old in (save for save in saves if save not in kept):
        if old.is_dir():
            remove_sharded(old)
        else:
            old.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a folder, oldest first. A folder of a save that was not finished is none."""
    found = (path for path in folder.glob("step_*") if _NAME.match(path.name))
    return sorted(path for path in found if path.suffix or is_sealed(path))


def remove_unfinished(folder: Path) -> None:
    """Removes what saves and removals left that were cut off."""
    for path in folder.glob(".*.writing"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in folder.glob("step_*"):
        if _NAME.match(path.name) and path.is_dir() and not is_sealed(path):
            shutil.rmtree(path)


def check_whole(path: str | Path) -> None:
    """Compares every byte of a checkpoint with its seal, or without a seal with the checksums of the zip format.

    Args:
        path: a file of torch.save, or the folder of a sharded checkpoint.
    Raises:
        CheckpointError: if it is missing, truncated, damaged or not a checkpoint.
    """
    path = Path(path)
    if is_sealed(path):
        check_sharded(path)
        return
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
    """Loads a checkpoint: a dict of tensors and plain values. No code of the file is run.

    The tensors of a file are memory-mapped: processes of a machine share their pages. Copy them before the file can be
    removed. Of a sharded checkpoint, model and average are read, without the optimizer.

    Args:
        path: a file of torch.save, or the folder of a sharded checkpoint.
        verify: call `check_whole` first; False if another process did.
    Raises:
        CheckpointError: as `check_whole`, or if the file holds other objects.
    """
    path = Path(path)
    if verify:
        check_whole(path)
    if is_sealed(path):
        return read_whole(path)
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
    check: Callable[[Path], None] = check_whole,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> tuple[Path, dict[str, Any]]:
    """Finds the newest undamaged checkpoint of a folder. Damaged ones are reported through `warn` and skipped.

    With several processes, each checks what `check` assigns to it, and all processes agree on the result.

    Args:
        folder: with the checkpoints.
        warn: takes a message.
        check: raises CheckpointError if the checkpoint, or this process's part of it, is damaged.
        gather: returns the values of a variable in all processes; a collective call.
    Returns:
        The path and the content. Of a file: memory-mapped, see `load_checkpoint`. Of a sharded checkpoint: the plain values
        and {"sharded": path}; `Parallel.read` reads the tensors.
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
        try:
            check(path)
        except CheckpointError as error:
            fault = str(error)
        faults = [found for found in gather(fault) if found is not None]
        if not faults and path.is_dir():
            return path, {**read_values(path), "sharded": path}
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
