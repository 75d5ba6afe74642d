"""Reads weights from any file and loads them strictly, with every tensor accounted for.

Code in a file is never run: torch files are read with `weights_only=True`. Objects other than tensors and plain values, such
as training arguments, are replaced by empty placeholders.
"""

from __future__ import annotations

import argparse
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mae_et.errors import CheckpointError
from mae_et.models.architecture import num_blocks
from mae_et.models.pos_embed import is_sincos_table
from mae_et.models.strict import misfit, some
from mae_et.storage.atomic import first_line
from mae_et.storage.checkpoint import check_whole, list_checkpoints, load_checkpoint
from mae_et.storage.digest import check_digest, state_digest
from mae_et.storage.layouts import from_layout, is_average
from mae_et.storage.metadata import check_metadata, hugging_face_metadata
from mae_et.storage.sharded_checkpoint import is_sealed

log = logging.getLogger(__name__)

FIXED_TABLES = ("pos_embed", "decoder_pos_embed")
# Placeholders run nothing. A file that names these modules was still made to run code, so its weights are not trusted.
_EXECUTING = {
    "builtins", "__builtin__", "os", "posix", "nt", "subprocess", "commands", "sys", "importlib", "runpy", "socket", "shutil",
    "ctypes", "pty", "webbrowser", "pickle", "code",
}  # fmt: skip
_PLAIN_BUILTINS = {
    "set",
    "frozenset",
    "complex",
    "slice",
    "range",
    "bytearray",
    "int",
    "float",
    "bool",
    "str",
    "object",
}


class _Placeholder:
    """Stands for an object of a class that is not imported."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def find_weights(path: str | Path, with_decoder: bool = False) -> Path:
    """Returns the file of weights that a path denotes.

    Args:
        path: a file or a sharded checkpoint; or the folder of a run, in which the exported backbone or classifier comes
            before the newest checkpoint; or a folder of Hugging Face.
        with_decoder: only a checkpoint of a run holds the decoder.
    Raises:
        CheckpointError: if there is none.
    """
    path = Path(path)
    if not path.is_dir() or is_sealed(path):
        if not path.exists():
            raise CheckpointError(f"no such file or folder: {path}")
        return path
    checkpoints = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    names = ("backbone.safetensors", "classifier.safetensors", "model.safetensors", "pytorch_model.bin")
    exported = [path / name for name in names if (path / name).is_file()]
    found = [*checkpoints[-1:], *exported] if with_decoder else [*exported, *checkpoints[-1:]]
    if not found:
        raise CheckpointError(
            f"{path} holds no weights (checkpoints/step_* or {', '.join(names)}): name the folder of a run or a file"
        )
    log.info("reading %s", found[0])
    return found[0]


def read_weights(path: str | Path, entry: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a state dict from any file.

    Args:
        path: as for `find_weights`. A safetensors file, or a torch file with the state itself or in one of its entries, as
            from the official MAE, timm, OpenMMLab, Lightning and this project.
        entry: the entry of a torch file ("model_ema", "state_dict.teacher"), or the prefix of names, to read where there
            are several; None: the largest that is not a moving average.
    Returns:
        The state, with names as from `from_layout`, and the metadata of the file.
    Raises:
        CheckpointError: if the file is missing or damaged, holds no tensors or NaN, or its metadata is invalid.
    """
    path = find_weights(path)
    state, metadata, entry = read_stored(path, entry)
    return from_layout(state, str(path), entry), metadata


def read_stored(path: str | Path, entry: str | None = None) -> tuple[dict[str, Tensor], dict[str, str], str | None]:
    """Reads a state dict like `read_weights`, but with the names of the file.

    Returns:
        The state, the metadata, and the entry if it may be a prefix of names.
    Raises:
        CheckpointError: as `read_weights`.
    """
    path = find_weights(path)
    where = str(path)
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
    else:
        state, metadata, entry = _read_torch(path, entry)
    metadata = {**hugging_face_metadata(path.parent / "config.json"), **metadata}
    check_metadata(metadata, where)
    check_digest(metadata.get("tensors_sha256"), _digest_if(state, metadata), "tensors_sha256", where)
    bad = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise CheckpointError(
            f"{where} holds NaN or infinite values in {len(bad)} of {len(state)} tensors: {some(bad)}. Use an earlier "
            "checkpoint of its training"
        )
    return state, metadata, entry


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    may_miss: tuple[str, ...] = (),
    may_be_new: tuple[str, ...] = (),
) -> list[str]:
    """Loads weights into a model, with every key accounted for.

    Stored position tables are compared with the fixed ones and not loaded.

    Args:
        model: the receiver.
        state: under the names of the model.
        where: the file, for messages.
        may_miss: prefixes of parameters that the state may lack, all or none of each prefix.
        may_be_new: names of parameters that keep their values if those of the state have another number of outputs.
    Returns:
        The names in `may_be_new` that kept their values.
    Raises:
        CheckpointError: if keys are missing, unexpected or of another shape. The message names them.
    """
    check_position_tables(state, where)
    state = {key: value for key, value in state.items() if key not in FIXED_TABLES}
    wanted = {key: value for key, value in model.state_dict().items() if key not in FIXED_TABLES}
    new = [
        key
        for key in may_be_new
        if key in state and len(state[key]) != len(wanted[key]) and state[key].shape[1:] == wanted[key].shape[1:]
    ]
    state = {key: value for key, value in state.items() if key not in new}
    absent = tuple(prefix for prefix in may_miss if not any(key.startswith(prefix) for key in state))
    if faults := misfit(state, wanted, lambda key: key in new or (bool(absent) and key.startswith(absent))):
        raise CheckpointError(
            f"{where} does not fit the model ({describe(state)}); {faults}. Set the model config "
            "(size, patch_size, in_chans, num_cls_tokens, num_registers, mlp, rotary_positions, decoder_*, target) to those of "
            "the file, or choose another file"
        )
    model.load_state_dict(state, strict=False)
    return new


def check_position_tables(state: Mapping[str, Tensor], where: str) -> None:
    """Checks that stored position tables are the fixed sine-cosine tables of a grid.

    Raises:
        CheckpointError: if they are not, for example because they were learnt.
    """
    for name in FIXED_TABLES:
        table = state.get(name)
        if table is not None and not is_sincos_table(table):
            raise CheckpointError(
                f"{where}: {name} {tuple(table.shape)} is not the fixed sine-cosine table of a grid. "
                + (
                    "Set model.learnt_positions = True to train with it"
                    if name == "pos_embed"
                    else "Choose a file of an MAE"
                )
            )


def describe(state: Mapping[str, Tensor]) -> str:
    """Describes a state dict in a few words."""
    depth = num_blocks(state, "blocks.")
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or not depth or kernel.ndim != 4:
        return f"{len(state)} tensors, no ViT encoder among them"
    width, channels, patch, _ = kernel.shape
    decoder = "with" if any(key.startswith("decoder_") for key in state) else "without"
    return f"a ViT of width {width}, depth {depth}, patch {patch}, {channels} channels, {decoder} a decoder"


def _digest_if(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return state_digest(state) if "tensors_sha256" in metadata else ""


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file: {first_line(error)}. Write or download it again"
        ) from error
    if not state:
        raise CheckpointError(f"{path} holds no tensors")
    return state, metadata


def _read_torch(path: Path, entry: str | None) -> tuple[dict[str, Tensor], dict[str, str], str | None]:
    """Returns the chosen state, the metadata, and the entry if it is none of the file but perhaps a prefix of names."""
    content = _load_without_code(path)
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensors in _states_in(content):
        if not any(_same(tensors, other) for other in states.values()):  # our exports for mmdet hold two entries
            states[name] = tensors
    if not states:
        entries = ", ".join(map(str, content)) or "nothing"
        raise CheckpointError(f"{path} holds no tensors; its entries are: {entries}")
    if entry in states:
        chosen, entry = entry, None
    else:
        chosen = min(states, key=lambda name: (is_average(name), -len(states[name])))
        others = [name for name in states if name != chosen and len(states[name]) > len(states[chosen]) // 2]
        if others and entry is None:
            log.warning(
                "%s holds several sets of weights: using %r. To use another (%s), write it to a file of its own: "
                "mae-et export %s OUT.safetensors --entry NAME", path, chosen, ", ".join(others), path,
            )  # fmt: skip
    state = {key: value.clone() for key, value in states[chosen].items()}  # the file is only mapped
    return state, _torch_metadata(content), entry


def _states_in(content: Mapping[Any, Any], prefix: str = "", depth: int = 3) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields each dict of tensors with its place, such as "model" or "state_dict.teacher"; optimizers are skipped."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield prefix or "the whole file", tensors
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and "optim" not in key.lower() and depth:
            yield from _states_in(value, f"{prefix}.{key}" if prefix else key, depth - 1)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[key].data_ptr() == other[key].data_ptr() for key in one)


def _torch_metadata(content: Mapping[str, Any]) -> dict[str, str]:
    metadata: dict[str, str] = {}
    if isinstance(content.get("metadata"), dict):
        metadata = {str(key): str(value) for key, value in content["metadata"].items()}
        if (
            isinstance(content.get("progress"), dict)
            and {"step"} <= content["progress"].keys()
            and "num_steps" in content
        ):
            metadata |= {"step": str(content["progress"]["step"]), "num_steps": str(content["num_steps"])}
    elif isinstance(content.get("args"), argparse.Namespace) and hasattr(content["args"], "norm_pix_loss"):
        metadata = {"target": "normalised pixels" if content["args"].norm_pix_loss else "pixels"}  # an official MAE
    return metadata


def _load_without_code(path: Path) -> dict[str, Any]:
    if is_sealed(path):
        return load_checkpoint(path)
    is_zip = zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        is_legacy = not is_zip and file.read(1) == b"\x80"  # torch before 1.6
    if not is_legacy:
        check_whole(path)
    # The real Namespace is harmless and holds the target of an official MAE.
    allowed: list[Any] = [argparse.Namespace]
    replaced: list[str] = []
    while True:
        try:
            with torch.serialization.safe_globals(allowed):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
            break
        except Exception as error:
            name = _refused_name(error)
            if name is None or name in replaced:
                raise CheckpointError(
                    f"{path} cannot be read as tensors and plain values ({_reason(error)}): save its weights alone, e.g. "
                    'torch.save({"model": model.state_dict()}, ...), where the file comes from'
                ) from error
            replaced.append(name)
            allowed.append((_Placeholder, name))
    if replaced:
        log.info("%s: ignored objects of these types, which are not weights: %s", path, some(replaced))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def _refused_name(error: Exception) -> str | None:
    """Returns the class or function that torch refused to load, if a placeholder may stand for it."""
    found = re.search(r"Unsupported global: GLOBAL (\S+) was not an allowed global", str(error))
    if found is None:
        return None
    name = found[1]
    if "." not in name:  # torch shortens builtins.print to print
        return f"builtins.{name}" if name in _PLAIN_BUILTINS else None
    return None if name.split(".")[0] in _EXECUTING else name


def _reason(error: Exception) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it names {found[1]}, which could run code; nothing was run" if found else first_line(error)
