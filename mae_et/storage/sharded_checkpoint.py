"""Checkpoints in parts: each process writes and reads its own part of the tensors, with torch.distributed.checkpoint.

A checkpoint is a folder: `__RANK_0.distcp` holds the tensors of a process, `.metadata` names them all, `values.pt` holds plain
values, and `manifest.json` the size and SHA-256 of each of these files. The folder is written under a temporary name. The
manifest is written last, then the folder gets its name. So a folder `step_XXXXXXXX` with a manifest is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mae_et.errors import CheckpointError
from mae_et.storage.atomic import first_line, write_error

MANIFEST, VALUES, METADATA = "manifest.json", "values.pt", ".metadata"
_RETRY = "run again with --resume"
# What the pickled metadata of torch.distributed.checkpoint consists of.
_PLAIN_TYPES = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("torch", "device"), ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"), ("pathlib", "Path"),
}  # fmt: skip


def stage(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Copies this process's part of tensors to the CPU, so that the training can continue while they are written."""
    return dcp.FileSystemWriter(_temporary(path)).stage(dict(tensors))


def write_sharded(
    staged: dict[str, Tensor], values: Mapping[str, Any], path: Path, group: dist.ProcessGroup | None
) -> None:
    """Writes a checkpoint whole or not at all. A collective call; may run in a thread that has its own group.

    Args:
        staged: as from `stage`; the same names in all processes. DTensors are sharded over the processes.
        values: plain values of the main process.
        path: of the folder.
        group: of gloo, used by nothing else meanwhile.
    Raises:
        CheckpointError: in all processes, if one of them cannot write.
    """
    temporary, is_main = _temporary(path), dist.get_rank(group) == 0
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    _agree(_attempt(lambda: temporary.mkdir(parents=True) if is_main else None, path), group)

    def write_tensors() -> None:
        # What several processes hold whole, e.g. the statistics of a BatchNorm, is that of the main process.
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        dcp.save(staged, storage_writer=dcp.FileSystemWriter(temporary), planner=planner, process_group=group)

    _agree(_attempt(write_tensors, path), group)
    own: dict[str, dict[str, Any]] = {}

    def write_values() -> None:
        names = [file.name for file in temporary.glob(f"__{dist.get_rank(group)}_*.distcp")]
        if is_main:
            torch.save(dict(values), temporary / VALUES)
            _sync(temporary / VALUES)
            names += [METADATA, VALUES]
        own.update({name: _fingerprint(temporary / name) for name in names})

    _agree(_attempt(write_values, path), group)
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, own, group=group)

    def seal() -> None:
        files = {name: fingerprint for part in parts for name, fingerprint in part.items()}
        (temporary / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
        _sync(temporary / MANIFEST)
        _sync(temporary)
        if path.exists():  # damaged, or the run resumed from an older checkpoint
            remove_sharded(path)
        os.replace(temporary, path)
        _sync(path.parent)

    _agree(_attempt(seal, path) if is_main else None, group)


def is_sealed(path: Path) -> bool:
    """Returns whether a path is a folder that a save has finished."""
    return (path / MANIFEST).is_file()


def remove_sharded(path: Path) -> None:
    """Removes a checkpoint. A removal that is cut off leaves a folder without a manifest, which counts as unfinished."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def check_sharded(path: Path, rank: int = 0, size: int = 1) -> None:
    """Compares the files of a checkpoint with its manifest: all names and sizes, and the SHA-256 of each `size`-th file.

    Args:
        path: of the folder.
        rank: which of the files; each is compared by one of the processes 0 to `size` - 1.
        size: number of processes that share the work.
    Raises:
        CheckpointError: if files are missing or changed, naming them.
    """
    advice = "use another checkpoint of the run"
    try:
        files: dict[str, dict[str, Any]] = json.loads((path / MANIFEST).read_text())["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a whole checkpoint: its {MANIFEST} cannot be read ({first_line(error)}): {advice}"
        ) from error
    names = sorted(expected)
    missing = [name for name in names if not (path / name).is_file()]
    if missing or not {METADATA, VALUES} <= expected.keys():
        raise CheckpointError(
            f"{path} is not whole: {len(missing)} of its {len(names)} files are missing: "
            f"{', '.join(missing) or 'not in the manifest'}. Copy the whole folder, or {advice}"
        )
    for name in names:
        found = (path / name).stat().st_size
        if found != expected[name][0]:
            raise CheckpointError(
                f"{path / name} is damaged: it has {found} bytes, {expected[name][0]} were written: {advice}"
            )
    for name in names[rank::size]:
        if _fingerprint(path / name)["sha256"] != expected[name][1]:
            raise CheckpointError(f"{path / name} is damaged: its SHA-256 differs from the recorded one: {advice}")


def read_values(path: Path) -> dict[str, Any]:
    """Reads the plain values of a checkpoint. No code of the file is run."""
    try:
        return torch.load(path / VALUES, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path / VALUES} cannot be read as plain values: {first_line(error)}") from error


def stored_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """Returns shape (`size`) and type (`properties.dtype`) of each tensor of a checkpoint, by name."""
    return {
        name: entry
        for name, entry in _Reader(path).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Reads tensors in place. A collective call of the group; each process reads what its part needs.

    Args:
        path: of the folder.
        tensors: by the names of the checkpoint. DTensors may be sharded in another way than they were written.
        group: of gloo; None: this process alone.
    Raises:
        CheckpointError: if a tensor is missing or has another shape.
    """
    try:
        dcp.load(tensors, storage_reader=_Reader(path), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        cause = first_line(next(iter(error.failures.values()))[0])
        raise CheckpointError(f"{path} cannot be read: {cause}") from error


def read_whole(path: Path, parts: tuple[str, ...] = ("model", "ema")) -> dict[str, Any]:
    """Reads a checkpoint into one process, in the form of a single file.

    Args:
        path: of the folder.
        parts: first words of the names of the tensors to read.
    Returns:
        The plain values, and for each part a dict of its tensors.
    """
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored_tensors(path).items()
        if name.partition(".")[0] in parts
    }
    read_tensors(path, tensors, None)
    content = read_values(path)
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        content.setdefault(part, {})[rest] = tensor
    return content


class _Unpickler(pickle.Unpickler):
    """Refuses everything but the plain types of the metadata, so that no code of the file can run."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module.startswith("torch.distributed.checkpoint.") and "." not in name
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        found = super().find_class(module, name) if is_type or is_dtype or (module, name) in _PLAIN_TYPES else None
        if found is None or (is_type and not isinstance(found, type)):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code; nothing was run")
        return found


class _Reader(dcp.FileSystemReader):
    """Reads the metadata without running code of the file."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA
        try:
            with open(path, "rb") as file:
                metadata: Metadata = _Unpickler(file).load()
        except Exception as error:  # a damaged pickle can raise nearly any error
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
        return metadata


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing")


def _attempt(work: Any, path: Path) -> str | None:
    """Runs a part of a save. Returns why it failed, or None; other processes must learn of it before this one raises."""
    try:
        work()
    except CheckpointException as error:  # of any process
        return _describe(next(iter(error.failures.values()))[0], path)
    except OSError as error:
        return _describe(error, path)
    except RuntimeError as error:
        failure = write_error(path, error, _RETRY)
        if failure is None:  # not an error of writing, e.g. a lost process
            raise
        return str(failure)
    return None


def _describe(error: BaseException, path: Path) -> str:
    if isinstance(error, OSError):
        where = Path(error.filename) if isinstance(error.filename, (str, Path)) else path
        if failure := write_error(where, error, _RETRY):
            return str(failure)
    return f"cannot write {path}: {first_line(error)}. Earlier checkpoints are unchanged. To continue, {_RETRY}"


def _agree(fault: str | None, group: dist.ProcessGroup | None) -> None:
    """Raises CheckpointError in all processes if one has a fault."""
    faults: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(faults, fault, group=group)
    if found := next((one for one in faults if one is not None), None):
        raise CheckpointError(found)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
