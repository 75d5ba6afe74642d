"""Metadata of backbone files: checks of untrusted values, what the tensors imply, and code that loads the file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from mae_et.errors import CheckpointError
from mae_et.models.pos_embed import sincos_grid
from mae_et.models.sizes import MAE_SIZES, plain_size, recorded_size
from mae_et.models.vit import NUM_HEADS, PATCHES, count_registers, mlp_ratio_of, num_blocks

HUGGING_FACE_TYPES = ("vit", "vit_mae", "vit_msn", "dinov2")
_TARGETS = ("pixels", "normalised pixels", "hog")


def _is_int(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(check: Callable[[Any], bool], most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and 0 < len(value) <= most and all(map(check, value))


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] < value[1]


def _is_size(value: Any) -> bool:
    """Returns whether a value is the side of a square image, or [height, width], px."""
    is_side = _is_int(1, 16384)
    return is_side(value) or (isinstance(value, list) and len(value) == 2 and all(map(is_side, value)))


_MASKS = ("random", "block", "grid")
_SIZE, _COUNT = _is_int(1, 65536), _is_int(0, 2**63)
# Key -> whether the JSON value is valid, and what is valid. Other keys are text that no code interprets.
_DIMENSIONS = ("embed_dim", "depth", "num_heads", "decoder_num_heads", "patch_size", "in_chans", "hog_cell_size")
_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_DIMENSIONS, (_SIZE, "an integer from 1 to 65536")),
    **dict.fromkeys(("step", "num_steps", "num_images"), (_COUNT, "an integer of 0 or more")),
    "num_registers": (_is_int(0, 65536), "an integer from 0 to 65536"),
    "image_size": (_is_size, "an integer from 1 to 16384, or two: height and width"),
    "mlp_ratio": (lambda value: _is_number(value) and 0 < value <= 1024, "a number above 0"),
    "norm_eps": (lambda value: _is_number(value) and 0 < value < 1, "a number between 0 and 1"),
    "mask_ratio": (lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "eval_crop_ratio": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
    "mean": (_is_list(_is_number, 4096), "a list of numbers"),
    "std": (_is_list(lambda value: _is_number(value) and value > 0, 4096), "a list of numbers above 0"),
    "value_range": (_is_range, "two numbers, black below white"),
    "bandwidths": (_is_list(_SIZE, 4096), "a list of integers of 1 or more"),
    **dict.fromkeys(("curriculum", "model_options"), (lambda value: isinstance(value, dict), "an object")),
    "class_names": (_is_list(lambda value: isinstance(value, str), 10**6), "a list of names"),
}


def stored_range(metadata: Mapping[str, str]) -> tuple[float, float] | None:
    """Returns the `data.value_range` that the backbone of some metadata was trained with; None: 8-bit images."""
    values = json.loads(metadata.get("value_range", "null"))
    return None if values is None else (float(values[0]), float(values[1]))


def check_metadata(metadata: Mapping[str, str], where: str) -> None:
    """Checks the values that code interprets, since a file may come from anywhere.

    Args:
        metadata: text; numbers and lists as JSON.
        where: the file, for the message.
    Raises:
        CheckpointError: naming file, key and value, if a value is not valid.
    """
    for key, (is_valid, valid) in _CHECKS.items():
        if key not in metadata:
            continue
        try:
            value = json.loads(metadata[key])
        except (ValueError, RecursionError):
            value = None
        if not is_valid(value):
            _refuse(where, key, metadata[key], valid)
    if metadata.get("mask_kind", "random") not in _MASKS:
        _refuse(where, "mask_kind", metadata["mask_kind"], f"one of {', '.join(_MASKS)}")
    if "target" in metadata and metadata["target"] not in _TARGETS:
        _refuse(where, "target", metadata["target"], f"one of {', '.join(_TARGETS)}")
    if metadata.get("target") == "hog" and "hog_cell_size" not in metadata:
        _refuse(where, "hog_cell_size", "", "given with target hog")


def hugging_face_metadata(path: Path) -> dict[str, str]:
    """Returns what the `config.json` of Hugging Face says about a ViT or ViTMAE; {} for other files.

    `preprocessor_config.json` in the same folder gives mean and std.

    Raises:
        CheckpointError: if the model is of another architecture, or its activation function is not GELU.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(config, dict) or "model_type" not in config:
        return {}
    if config["model_type"] not in HUGGING_FACE_TYPES:
        raise CheckpointError(
            f"{path}: model_type = {config['model_type']!r}; of Hugging Face only {', '.join(HUGGING_FACE_TYPES)} can be read. "
            "Convert the model to timm's names, or choose another folder"
        )
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{path}: hidden_act = {config['hidden_act']!r}; only 'gelu' is supported")
    if config.get("use_swiglu_ffn"):
        raise CheckpointError(
            f"{path}: use_swiglu_ffn = true; a plain ViT has GELU in its MLPs. Choose a smaller DINOv2"
        )
    names = {
        "num_heads": "num_attention_heads",
        "decoder_num_heads": "decoder_num_attention_heads",
        "image_size": "image_size",
    }
    metadata = {ours: json.dumps(config[theirs]) for ours, theirs in names.items() if theirs in config}
    metadata["norm_eps"] = json.dumps(config.get("layer_norm_eps", 1e-12))  # the default of transformers
    metadata |= _processor_metadata(path.parent / "preprocessor_config.json")
    if config["model_type"] == "vit_mae":
        metadata["target"] = "normalised pixels" if config.get("norm_pix_loss") else "pixels"
    return metadata


def _processor_metadata(path: Path) -> dict[str, str]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    names = {"mean": "image_mean", "std": "image_std"}
    return {ours: json.dumps(config[theirs]) for ours, theirs in names.items() if theirs in config}


def architecture_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the architecture that the tensors of a ViT with timm's names imply, as metadata; {} if it is not a ViT."""
    kernel = state.get(PATCHES)
    if kernel is None or kernel.ndim != 4:
        return {}
    width, channels, patch, _ = kernel.shape
    values: dict[str, Any] = {
        "embed_dim": width,
        "depth": num_blocks(state, "blocks."),
        "patch_size": patch,
        "in_chans": channels,
        "mlp_ratio": mlp_ratio_of(state),
    }
    if registers := count_registers(state):
        values["num_registers"] = registers
    table = state.get("pos_embed")
    if table is not None and table.ndim == 3 and table.shape[1] > 1:
        side = math.isqrt(table.shape[1] - 1)
        grid = sincos_grid(table.detach().cpu()) or (side, side)
        if grid[0] * grid[1] == table.shape[1] - 1:  # a learnt table of a rectangle does not show its grid
            values["image_size"] = plain_size((grid[0] * patch, grid[1] * patch))
    if width in NUM_HEADS:
        values["num_heads"] = NUM_HEADS[width]
    return {key: json.dumps(value) for key, value in values.items()}


def loading_lines(metadata: Mapping[str, str], path: str | Path = "backbone.safetensors") -> str:
    """Returns Python code that loads a backbone file in layout "timm" with timm alone.

    Args:
        metadata: as returned by `write_backbone` or stored in the file.
        path: of the file.
    Raises:
        CheckpointError: if the metadata does not record the architecture.
    """
    keys = ("embed_dim", "depth", "num_heads", "patch_size", "in_chans", "image_size")
    if missing := [key for key in keys if key not in metadata]:
        raise CheckpointError(f"{path} does not record {', '.join(missing)}: export it again from its checkpoint")
    dims = {key: int(metadata[key]) for key in keys[:-1]}
    size = recorded_size(metadata)
    mlp_ratio = float(metadata.get("mlp_ratio", 4.0))
    options = {
        "img_size": size[0] if size[0] == size[1] else size,
        "in_chans": dims["in_chans"],
        "global_pool": metadata.get("global_pool", "token"),
        "reg_tokens": int(metadata.get("num_registers", 0)),
    }
    defaults = {"img_size": 224, "in_chans": 3, "global_pool": "token", "reg_tokens": 0}
    changed = "".join(f"{key}={value!r}, " for key, value in options.items() if value != defaults[key])
    eps = float(metadata.get("norm_eps", 1e-6))
    if eps != 1e-6:
        changed += f"norm_layer=partial(nn.LayerNorm, eps={eps!r}), "
    name = _timm_name(dims) if mlp_ratio == 4.0 else None
    if name is not None:
        build = ["import timm"], f'timm.create_model("{name}", {changed}num_classes=0)'
    else:
        sizes = ", ".join(f"{key}={dims[key]}" for key in ("patch_size", "embed_dim", "depth", "num_heads"))
        ratio = "" if mlp_ratio == 4.0 else f"mlp_ratio={mlp_ratio!r}, "
        call = f"VisionTransformer({changed}{sizes}, {ratio}num_classes=0)"
        build = ["from timm.models.vision_transformer import VisionTransformer"], call
    if Path(path).suffix == ".safetensors":
        read = "from safetensors.torch import load_file", f"load_file({str(path)!r})"
    else:
        read = "import torch", f'torch.load({str(path)!r}, weights_only=True)["model"]'
    norm = ["from functools import partial", "from torch import nn"] if eps != 1e-6 else []
    imports = sorted([*build[0], *norm, read[0]])
    return "\n".join([*imports, "", f"model = {build[1]}", f"model.load_state_dict({read[1]}, strict=True)"])


def _timm_name(dims: Mapping[str, int]) -> str | None:
    """Returns timm's name of a ViT, if it has one for these dimensions."""
    for size, known in MAE_SIZES.items():
        name = f"vit_{size}_patch{dims['patch_size']}_224"
        if all(dims[key] == vars(known)[key] for key in ("embed_dim", "depth", "num_heads")) and timm.is_model(name):
            return name
    return None


def _refuse(where: str, key: str, value: str, valid: str) -> None:
    shown = value if len(value) <= 60 else f"{value[:60]}..."
    raise CheckpointError(
        f"{where}: the metadata has {key} = {shown!r}, which must be {valid}. The file was edited or is not from this project: "
        "write it again from its checkpoint"
    )
