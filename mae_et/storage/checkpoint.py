"""Files of tensors that are whole or absent: atomic saves, rotation, verification on load, and strict loading of weights."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mae_et.errors import CheckpointError
from mae_et.models.pos_embed import is_sincos_table
from mae_et.models.strict import misfit

_SEAL = b"sha256 of all before: "
_NAME = re.compile(r"step_(\d{8})\.pt$")
FIXED_TABLES = ("pos_embed", "decoder_pos_embed")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it over `path` once the block has succeeded and it is on disk.

    Raises:
        CheckpointError: if it cannot be written; whatever stood at `path` before still does.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' writers hide the OSError
        free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.exists() else 0
        raise CheckpointError(
            f"cannot write {path}: {_first_line(error)}. {free:.0f} MiB are free there. "
            "What was saved before is whole: free space and run again with --resume"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_checkpoint(state: Mapping[str, Any], folder: Path, step: int, keep: int) -> Path:
    """Writes `step_XXXXXXXX.pt` atomically, then removes all but it and the `keep` - 1 before it.

    Raises:
        CheckpointError: if it cannot be written.
    """
    path = folder / f"step_{step:08d}.pt"
    with atomic_path(path) as temporary:
        torch.save(dict(state), temporary)
        _seal(temporary)
    saves = list_checkpoints(folder)
    here = saves.index(path)
    # Those ahead of this step were passed over as damaged when the run resumed from an older one.
    for old in (*saves[: max(0, here + 1 - keep)], *saves[here + 1 :]):
        old.unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if _NAME.match(path.name))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a file that torch.save wrote, after checking every byte of it against its checksums.

    Nothing but tensors and plain values is unpickled.
    Raises:
        CheckpointError: if it is missing, truncated, damaged, no checkpoint, or holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    try:
        damaged = _damage(path)
    except Exception:  # a damaged header can raise nearly anything
        raise CheckpointError(
            f"{path} is no checkpoint, or a truncated one ({path.stat().st_size} bytes): use another save of the run, or "
            "download the file again"
        ) from None
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged ({damaged}): use another save of the run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as plain tensors: {_first_line(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dict of tensors")
    return state


def load_newest(folder: Path, warn: Any) -> tuple[Path, dict[str, Any]]:
    """Loads the newest whole checkpoint of a folder; damaged ones are named through `warn` and passed over.

    Raises:
        CheckpointError: if there is none.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, load_checkpoint(path)
        except CheckpointError as error:
            warn(f"{error}; trying the save before it")
    raise CheckpointError(f"no checkpoint to resume from in {folder}: start without --resume")


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a state dict from any file a backbone comes in.

    Args:
        path: safetensors; or a torch file with the state itself or under `model` or `state_dict` (the official MAE's,
            timm's, ours). A wrapper's prefix (`module.`, `_orig_mod.`, `backbone.`, `model.`) is stripped where all
            keys share it.
    Returns:
        The state and the file's metadata (empty for torch files).
    Raises:
        CheckpointError: as `load_checkpoint`, or if the file holds no tensors.
    """
    path = Path(path)
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise CheckpointError(f"no such file: {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error
    else:
        content = _load_any(path)
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), dict):
                content = content[key]
        state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no tensors")
    for prefix in ("module.", "_orig_mod.", "model.", "backbone."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state, metadata


def load_weights(
    model: nn.Module, path: str | Path, may_miss: tuple[str, ...] = (), may_be_new: tuple[str, ...] = ()
) -> list[str]:
    """Loads a file's weights into a model, every key accounted for.

    Stored position tables are compared with the model's own and then left out: they are fixed.
    Args:
        model: the receiver.
        path: as for `read_weights`.
        may_miss: prefixes of parameters that the file may lack, all or none of each prefix.
        may_be_new: names of parameters that stay as they are where the file's have another number of outputs.
    Returns:
        Those of `may_be_new` that stayed as they were.
    Raises:
        CheckpointError: naming the keys that are missing, unexpected or of another shape.
    """
    state, _ = read_weights(path)
    own = model.state_dict()
    check_position_tables(state, path)
    state = {key: value for key, value in state.items() if key not in FIXED_TABLES}
    wanted = {key: value for key, value in own.items() if key not in FIXED_TABLES}
    new = [
        key
        for key in may_be_new
        if key in state and len(state[key]) != len(wanted[key]) and state[key].shape[1:] == wanted[key].shape[1:]
    ]
    state = {key: value for key, value in state.items() if key not in new}
    absent = tuple(prefix for prefix in may_miss if not any(key.startswith(prefix) for key in state))
    if faults := misfit(state, wanted, lambda key: key in new or (bool(absent) and key.startswith(absent))):
        raise CheckpointError(
            f"{path} does not fit the model ({describe(state)}); {faults}. Set the model config "
            "(size, patch_size, in_chans, decoder_*, target) to the file's architecture, or choose another file"
        )
    model.load_state_dict(state, strict=False)
    return new


def check_position_tables(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Makes sure that stored position tables are the fixed sine-cosine ones, for whatever square grid.

    Raises:
        CheckpointError: if they are not, e.g. because they were learnt.
    """
    for name in FIXED_TABLES:
        table = state.get(name)
        if table is not None and not is_sincos_table(table):
            raise CheckpointError(
                f"{path}: {name} {tuple(table.shape)} is not the fixed sine-cosine table of a square grid, which is the "
                "only one that this model can continue from"
            )


def describe(state: Mapping[str, Tensor]) -> str:
    """Says in a few words what a state dict looks like."""
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or not depth:
        return f"{len(state)} tensors, no ViT encoder among them"
    width, channels, patch, _ = kernel.shape
    has_decoder = any(key.startswith("decoder_") for key in state)
    return (
        f"a ViT of width {width}, depth {depth}, patch {patch}, {channels} channels, "
        f"{'with' if has_decoder else 'without'} a decoder"
    )


def _seal(path: Path) -> None:
    """Writes the SHA-256 of a zip file into its comment: the zip's own checksums leave its headers unprotected."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = _SEAL + b"0" * 64
    digest = _digest(path)
    with open(path, "rb+") as file:
        file.seek(-64, os.SEEK_END)
        file.write(digest)


def _damage(path: Path) -> str | None:
    """Returns what is wrong with a zip file, by its seal, or without one by the zip's checksums."""
    with open(path, "rb") as file:
        file.seek(-64 - len(_SEAL), os.SEEK_END)
        tail = file.read()
    if tail.startswith(_SEAL):
        return None if tail[len(_SEAL) :] == _digest(path) else "its SHA-256 is another"
    with zipfile.ZipFile(path) as archive:
        if archive.comment.startswith(_SEAL[:4]):
            return "truncated: its seal is cut off"
        bad = archive.testzip()
    return None if bad is None else f"checksum of {bad}"


def _digest(path: Path) -> bytes:
    """Returns the SHA-256 of all but the last 64 bytes, in hexadecimal."""
    remaining, digest = path.stat().st_size - 64, hashlib.sha256()
    with open(path, "rb") as file:
        while remaining:
            block = file.read(min(remaining, 2**24))
            digest.update(block)
            remaining -= len(block)
    return digest.hexdigest().encode()


def _load_any(path: Path) -> dict[str, Any]:
    """Like load_checkpoint, but also reads torch's format before 1.6, and the official MAE's files with their arguments."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        if zipfile.is_zipfile(path) or not path.is_file() or path.open("rb").read(1) != b"\x80":
            return load_checkpoint(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read as plain tensors: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
