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
from mae_et.models.architecture import NORM_EPS, PATCHES, encoder_options, published_heads
from mae_et.models.blocks import mlp_arguments
from mae_et.models.pos_embed import sincos_grid
from mae_et.models.sizes import MAE_SIZES, plain_size, recorded_size
from mae_et.models.vit import ROTARY_OPTIONS

HUGGING_FACE_TYPES = ("vit", "vit_mae", "vit_msn", "pixio", "dinov2", "dinov2_with_registers", "dinov3_vit")
_NAMES: Mapping[str, tuple[str, ...]] = {
    "mask_kind": ("random", "block", "grid"),
    "mlp": ("gelu", "swiglu"),
    "target": ("pixels", "normalised pixels", "hog"),
}


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


_SIZE, _COUNT = _is_int(1, 65536), _is_int(0, 2**63)
# Key -> whether the JSON value is valid, and what is valid. Other keys are text that no code interprets.
_DIMENSIONS = ("embed_dim", "depth", "num_heads", "decoder_num_heads", "patch_size", "in_chans", "hog_cell_size")
_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_DIMENSIONS, (_SIZE, "an integer from 1 to 65536")),
    **dict.fromkeys(("step", "num_steps", "num_images"), (_COUNT, "an integer of 0 or more")),
    "num_registers": (_is_int(0, 65536), "an integer from 0 to 65536"),
    **dict.fromkeys(("num_cls_tokens", "mask_grid"), (_is_int(1, 65536), "an integer from 1 to 65536")),
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
    "rotary_positions": (lambda value: isinstance(value, bool), "true or false"),
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
    for key, names in _NAMES.items():
        if key in metadata and metadata[key] not in names:
            _refuse(where, key, metadata[key], f"one of {', '.join(names)}")
    if metadata.get("target") == "hog" and "hog_cell_size" not in metadata:
        _refuse(where, "hog_cell_size", "", "given with target hog")


def hugging_face_metadata(path: Path) -> dict[str, str]:
    """Returns what the `config.json` of Hugging Face says about a ViT, ViTMAE, Pixio, DINOv2 or DINOv3; {} for other files.

    `preprocessor_config.json` in the same folder gives mean and std.

    Raises:
        CheckpointError: if the model is of another architecture, or has another activation function or base of the rotations.
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
    activation = (
        "silu" if config.get("use_gated_mlp") else "gelu"
    )  # of DINOv3; the SwiGLU of DINOv2 is always with SiLU
    if config.get("hidden_act", "gelu") != activation:
        raise CheckpointError(f"{path}: hidden_act = {config['hidden_act']!r}; only {activation!r} is supported")
    rotary = config["model_type"] == "dinov3_vit"
    if rotary and config.get("rope_theta", 100.0) != 100.0:
        raise CheckpointError(f"{path}: rope_theta = {config['rope_theta']!r}; only 100, that of DINOv3, is supported")
    names = {
        "num_heads": "num_attention_heads",
        "decoder_num_heads": "decoder_num_attention_heads",
        "image_size": "image_size",
    }
    metadata = {ours: json.dumps(config[theirs]) for ours, theirs in names.items() if theirs in config}
    metadata["norm_eps"] = json.dumps(config.get("layer_norm_eps", 1e-12))  # the default of transformers
    if rotary:
        metadata["rotary_positions"] = "true"
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
    values = encoder_options(state)
    width, patch = values["embed_dim"], values["patch_size"]
    usual = {"num_cls_tokens": 1, "num_registers": 0, "mlp": "gelu", "rotary_positions": False}  # not recorded
    values = {key: value for key, value in values.items() if key not in usual or value != usual[key]}
    if "rotary_positions" in values:
        values["norm_eps"] = NORM_EPS[True]
    table = state.get("pos_embed")
    if table is not None and table.ndim == 3 and table.shape[1] > 1:
        side = math.isqrt(table.shape[1] - 1)
        grid = sincos_grid(table) or (side, side)
        if grid[0] * grid[1] == table.shape[1] - 1:  # a learnt table of a rectangle does not show its grid
            values["image_size"] = plain_size((grid[0] * patch, grid[1] * patch))
    if heads := published_heads(state).get(width):
        values["num_heads"] = heads
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


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
    mlp_ratio, swiglu = float(metadata.get("mlp_ratio", 4.0)), metadata.get("mlp") == "swiglu"
    rotary = metadata.get("rotary_positions") == "true"
    registers, num_cls_tokens = "num_reg_tokens" if rotary else "reg_tokens", int(metadata.get("num_cls_tokens", 1))
    options = {
        "img_size": size[0] if size[0] == size[1] else size,
        "in_chans": dims["in_chans"],
        "global_pool": metadata.get("global_pool", "token"),
        registers: int(metadata.get("num_registers", 0)) + num_cls_tokens - 1,
    }
    defaults = {"img_size": 224, "in_chans": 3, "global_pool": "avg" if rotary else "token", registers: 0}
    changed = "".join(f"{key}={value!r}, " for key, value in options.items() if value != defaults[key])
    imports = []
    eps = float(metadata.get("norm_eps", NORM_EPS[rotary]))
    if eps != 1e-6:
        changed += f"norm_layer=partial(nn.LayerNorm, eps={eps!r}), "
        imports += ["from functools import partial", "from torch import nn"]
    name = _timm_name(dims) if mlp_ratio == 4.0 and not swiglu and not rotary else None
    if name is not None:
        imports.append("import timm")
        call = f'timm.create_model("{name}", {changed}num_classes=0)'
    else:
        changed += "".join(f"{key}={dims[key]}, " for key in ("patch_size", "embed_dim", "depth", "num_heads"))
        arguments = {"mlp_ratio": mlp_ratio, **ROTARY_OPTIONS, "swiglu_mlp": swiglu} if rotary else {}
        if swiglu and not rotary:
            mlp_ratio = mlp_arguments("swiglu", dims["embed_dim"], mlp_ratio)["mlp_ratio"]
            changed += "mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, "
            imports += ["from timm.layers import SwiGLUPacked", "from torch import nn"]
        if not rotary and mlp_ratio != 4.0:
            arguments = {"mlp_ratio": mlp_ratio}
        changed += "".join(f"{key}={value!r}, " for key, value in arguments.items())
        module, kind = ("eva", "Eva") if rotary else ("vision_transformer", "VisionTransformer")
        imports.append(f"from timm.models.{module} import {kind}")
        call = f"{kind}({changed}num_classes=0)"
    if Path(path).suffix == ".safetensors":
        read = "from safetensors.torch import load_file", f"load_file({str(path)!r})"
    else:
        read = "import torch", f'torch.load({str(path)!r}, weights_only=True)["model"]'
    imports = sorted({*imports, read[0]})
    lines = [*imports, "", f"model = {call}", f"model.load_state_dict({read[1]}, strict=True)"]
    if num_cls_tokens > 1:
        lines.append(f"# feature of an image: model.forward_features(images)[:, :{num_cls_tokens}].mean(dim=1)")
    return "\n".join(lines)


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
