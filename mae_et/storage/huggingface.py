"""Writes folders that the transformers library loads, in the class that has the architecture of the encoder.

ViTMAEForPreTraining, ViTForImageClassification and ViTModel hold the ViT of MAE; Dinov2Model has layer scales and SwiGLUs,
Dinov2WithRegistersModel also registers, DINOv3ViTModel also rotary positions. PixioModel has several cls tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from mae_et.errors import CheckpointError, UserError
from mae_et.models.architecture import (
    DECODER,
    NUM_DECODER_HEADS,
    PATCHES,
    count_cls_tokens,
    count_registers,
    is_rotary,
    known_num_heads,
    mlp_of,
    num_blocks,
    published_heads,
    recorded_eps,
)
from mae_et.models.cls_tokens import joined_cls_tokens
from mae_et.models.position_table import recorded_grid, table_grid, with_register_rows
from mae_et.models.sizes import ratio_of, recorded_size
from mae_et.models.strict import some
from mae_et.storage.atomic import atomic_path
from mae_et.storage.backbone import read_backbone, write_safetensors
from mae_et.storage.huggingface_names import hugging_face_names
from mae_et.storage.layouts import beyond_mae, to_layout
from mae_et.storage.metadata import architecture_of
from mae_et.storage.plain import layer_scales, without_layer_scales
from mae_et.storage.weights import find_weights

log = logging.getLogger(__name__)

_HEAD = ("head.weight", "head.bias")
_TYPES = {
    "ViTModel": "vit",
    "ViTForImageClassification": "vit",
    "ViTMAEForPreTraining": "vit_mae",
    "PixioModel": "pixio",
    "Dinov2Model": "dinov2",
    "Dinov2WithRegistersModel": "dinov2_with_registers",
    "DINOv3ViTModel": "dinov3_vit",
}
_DINO = ("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel")


def export_hugging_face(
    source: str | Path, folder: str | Path, entry: str | None = None, num_heads: int | None = None
) -> dict[str, str]:
    """Writes `config.json`, `model.safetensors` and `preprocessor_config.json`.

    The ViT of MAE becomes a ViTMAEForPreTraining with a decoder for pixels, a ViTForImageClassification with a classifier on
    the cls token, else a ViTModel. Rotary positions need a DINOv3ViTModel, registers a Dinov2WithRegistersModel, SwiGLUs a
    Dinov2Model; so do layer scales of the source, which are kept. Several cls tokens need a PixioModel, without any of these.
    These four have no decoder. Where they have a layer scale
    and the source has none, it is 1. Their mask token, which only their own pre-training uses, is 0.

    Args:
        source, entry: as for `read_weights`.
        folder: to write to. It is created if it is absent; files of these names are replaced.
        num_heads: of the encoder; None: from the metadata, or known by the width.
    Returns:
        The metadata of `model.safetensors`, with the name of the class in `hugging_face_class`.
    Raises:
        CheckpointError: if the source has tensors or sizes without a place in these classes, or lacks tensors.
        UserError: if `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: layout 'huggingface' writes a folder, choose another OUT")
    source = find_weights(source, with_decoder=True)
    where = str(source)
    state, metadata = read_backbone(source, entry, keep_layer_scales=True)
    if "norm.weight" not in state and "fc_norm.weight" in state:
        raise CheckpointError(
            f"{where} is a classifier on the mean of the patches, and ViTForImageClassification uses the cls token: export it "
            "as 'onnx', or its encoder as 'timm'"
        )
    name = _class_of(state, metadata, where)
    if name not in _DINO:
        state = without_layer_scales(state, where)
    kept = _tensors_of(name, state, where)
    metadata = {
        **architecture_of(state), **metadata,
        "source": source.name, "layout": "huggingface", "hugging_face_class": name,
    }  # fmt: skip
    metadata.pop("tensors_sha256", None)  # of the source; the writer adds that of the renamed tensors
    config = _config(name, kept, metadata, where, num_heads)
    metadata["num_heads"] = json.dumps(config["num_attention_heads"])
    processor = _processor(metadata, config["image_size"], where)
    folder.mkdir(parents=True, exist_ok=True)
    if name == "PixioModel":  # it adds a position to each cls token
        kept["pos_embed"] = with_register_rows(kept["pos_embed"], count_cls_tokens(kept) - 1)
    tensors = hugging_face_names(kept, name)
    if name in _DINO:
        tensors |= _unused_tensors(name, kept)
    write_safetensors(tensors, folder / "model.safetensors", metadata)
    _write_json(folder / "config.json", config)
    if processor is not None:
        _write_json(folder / "preprocessor_config.json", processor)
    return metadata


def _class_of(state: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> str:
    beyond = beyond_mae(state)
    encoder = "ViTModel"
    if count_cls_tokens(state) > 1:
        encoder = "PixioModel"
        if count_registers(state) or is_rotary(state) or mlp_of(state)[0] != "gelu":
            raise CheckpointError(
                f"{where} has {', '.join(beyond)}, and no class of transformers has all of these: export it in layout 'timm' or "
                "'onnx'"
            )
    elif is_rotary(state):
        encoder = "DINOv3ViTModel"
    elif count_registers(state):
        encoder = "Dinov2WithRegistersModel"
    elif beyond or (layer_scales(state) and PATCHES in state and _dinov2_ratio(state) is not None):
        encoder = "Dinov2Model"
    if "decoder_pred.weight" in state:
        if metadata.get("target") == "hog":
            log.warning("%s predicts HOG descriptors, which ViTMAE cannot: the decoder is left out", where)
            return encoder
        if beyond:
            what = ", ".join(beyond)
            log.warning("%s has %s, for which ViTMAE has no place: the decoder is left out", where, what)
            return encoder
        if "target" not in metadata:
            log.warning("%s does not record its target: config.json says norm_pix_loss = false", where)
        return "ViTMAEForPreTraining"
    if not set(_HEAD) <= state.keys():
        return encoder
    if beyond:
        raise CheckpointError(
            f"{where} is a classifier whose encoder has {', '.join(beyond)}, and transformers has no classifier on the cls "
            "token alone with such an encoder: export it as 'onnx', or its encoder as 'timm'"
        )
    return "ViTForImageClassification"


def _tensors_of(name: str, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns the tensors of the class under timm's names, after the checks of `to_layout`."""
    scales = layer_scales(state)
    head = {key: state[key] for key in _HEAD} if name == "ViTForImageClassification" else {}
    body = {key: value for key, value in state.items() if key not in head and key not in scales}
    kept = to_layout(body, "mae" if name == "ViTMAEForPreTraining" else "timm", where) | head
    if "fc_norm.weight" in kept:
        raise CheckpointError(f"{where} has both norm and fc_norm, and a ViT of Hugging Face has one final norm")
    decoder = [key for key in state if key.startswith(DECODER) and key not in kept]
    if decoder and name != "ViTMAEForPreTraining":
        log.info("%s: left out %d tensors of the decoder: %s", where, len(decoder), some(decoder))
    kept = joined_cls_tokens(kept, count_cls_tokens(state), where)
    if "pos_embed" in body:
        kept["pos_embed"] = body["pos_embed"]  # that of timm has rows for registers
    if name not in _DINO:
        return kept
    names = [f"blocks.{i}.ls{j}.gamma" for i in range(num_blocks(kept, "blocks.")) for j in (1, 2)]
    if new := [key for key in names if key not in scales]:
        log.info("%s: %s has layer scales; %d of them are set to 1, which changes no feature", where, name, len(new))
    return kept | scales | {key: torch.ones_like(kept["norm.weight"]) for key in new}


def _unused_tensors(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors that the classes of DINO require and that no feature depends on."""
    mask = torch.zeros_like(state["cls_token"])  # [1, 1, D]
    if name != "DINOv3ViTModel":
        return {"embeddings.mask_token": mask[0]}
    registers = {} if "reg_token" in state else {"embeddings.register_tokens": mask[:, :0]}
    return {"embeddings.mask_token": mask, **registers}


def _config(
    name: str, state: Mapping[str, Tensor], metadata: Mapping[str, str], where: str, num_heads: int | None
) -> dict[str, Any]:
    width, channels, patch, other_side = state[PATCHES].shape
    rows, columns = _grid(state, metadata, where)
    if patch != other_side or rows != columns:
        raise CheckpointError(
            f"{where} has no square patches and square grid, which Hugging Face's config.json requires: its patches have {patch} "
            f"x {other_side} px, its grid {rows} x {columns}. Export it in layout 'timm' or 'onnx'"
        )
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": _TYPES[name],
        "hidden_size": width,
        "num_hidden_layers": num_blocks(state, "blocks."),
        "num_attention_heads": known_num_heads(
            width, where, num_heads, metadata.get("num_heads"), published_heads(state), "num_heads"
        ),
        "initializer_range": 0.02,
        "layer_norm_eps": recorded_eps(state, metadata),
        "image_size": rows * patch,
        "patch_size": patch,
        "num_channels": channels,
        "dtype": "float32",
    }
    config |= _dinov3_config(state) if name == "DINOv3ViTModel" else _vit_config(name, state, where)
    if name == "ViTMAEForPreTraining":
        decoder_width = state["decoder_embed.weight"].shape[0]
        config |= {
            "decoder_hidden_size": decoder_width,
            "decoder_num_hidden_layers": num_blocks(state, "decoder_blocks."),
            "decoder_num_attention_heads": known_num_heads(
                decoder_width, f"the decoder of {where}", None, metadata.get("decoder_num_heads"), NUM_DECODER_HEADS,
                "decoder_num_heads",
            ),
            "decoder_intermediate_size": state["decoder_blocks.0.mlp.fc1.weight"].shape[0],
            "mask_ratio": float(metadata.get("mask_ratio", 0.75)),
            "norm_pix_loss": metadata.get("target") == "normalised pixels",
        }  # fmt: skip
    elif name == "ViTForImageClassification":
        num_classes = state["head.weight"].shape[0]
        names = json.loads(metadata.get("class_names", "null")) or [f"LABEL_{i}" for i in range(num_classes)]
        if len(names) != num_classes:
            raise CheckpointError(f"{where} records {len(names)} class names for {num_classes} outputs")
        config["id2label"] = {str(i): label for i, label in enumerate(names)}
        config["label2id"] = {label: i for i, label in enumerate(names)}
    return config


def _grid(state: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> tuple[int, int]:
    if not is_rotary(state):
        return table_grid(state["pos_embed"], state[PATCHES].shape[0], where, recorded_grid(state, metadata))
    (height, width), patch = recorded_size(metadata), state[PATCHES].shape[2]
    return height // patch, width // patch


def _vit_config(name: str, state: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Returns what ViTs, Pixio and Dinov2 have beside the common sizes."""
    config: dict[str, Any] = {
        "hidden_act": "gelu",  # a SwiGLU of Dinov2 is always with SiLU
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": True,
    }
    if name == "PixioModel":
        config |= {"n_cls_tokens": count_cls_tokens(state)}
    elif name not in _DINO:
        return config | {"intermediate_size": _hidden_width(state)}
    if (ratio := _dinov2_ratio(state)) is None:
        width = state[PATCHES].shape[0]
        possible = (_dinov2_hidden(state, ratio) for ratio in range(1, 2 * _hidden_width(state) // width + 2))
        nearest = min(possible, key=lambda hidden: abs(hidden - _hidden_width(state)))
        what = "two thirds of a multiple of the width, rounded up to a multiple of 8" if _is_swiglu(state) else (
            "a multiple of the width"
        )  # fmt: skip
        raise CheckpointError(
            f"{where} has MLPs of hidden width {_hidden_width(state)} at width {width}, and those of {name} have {what}: export "
            f"it in layout 'timm', or pre-train with model.mlp_ratio={ratio_of(nearest, width):.6g}"
        )
    if name == "PixioModel":
        return config | {"mlp_ratio": ratio}
    config |= {"mlp_ratio": ratio, "use_swiglu_ffn": _is_swiglu(state), "layerscale_value": 1.0}
    return config if name == "Dinov2Model" else config | {"num_register_tokens": count_registers(state)}


def _dinov3_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns what DINOv3 has beside the common sizes."""
    return {
        "intermediate_size": _hidden_width(state),
        "use_gated_mlp": _is_swiglu(state),
        "hidden_act": "silu" if _is_swiglu(state) else "gelu",
        "attention_dropout": 0.0,
        "query_bias": True,
        "key_bias": False,
        "value_bias": True,
        "proj_bias": True,
        "mlp_bias": True,
        "layerscale_value": 1.0,
        "num_register_tokens": count_registers(state),
        "rope_theta": 100.0,
        # Random changes of the coordinates while transformers trains. Training here has none.
        "pos_embed_shift": None,
        "pos_embed_jitter": None,
        "pos_embed_rescale": None,
    }


def _is_swiglu(state: Mapping[str, Tensor]) -> bool:
    return mlp_of(state)[0] == "swiglu"


def _hidden_width(state: Mapping[str, Tensor]) -> int:
    return int(state[PATCHES].shape[0] * mlp_of(state)[1])


def _dinov2_hidden(state: Mapping[str, Tensor], ratio: int) -> int:
    """Returns the hidden width that Dinov2 of transformers computes from `mlp_ratio`."""
    hidden = state[PATCHES].shape[0] * ratio
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if _is_swiglu(state) else hidden


def _dinov2_ratio(state: Mapping[str, Tensor]) -> int | None:
    """Returns the `mlp_ratio`, an integer, that gives Dinov2 the hidden width of these MLPs; None if there is none."""
    hidden = _hidden_width(state)
    ratios = range(1, 2 * hidden // state[PATCHES].shape[0] + 2)
    return next((ratio for ratio in ratios if _dinov2_hidden(state, ratio) == hidden), None)


def _processor(metadata: Mapping[str, str], image_size: int, where: str) -> dict[str, Any] | None:
    """Returns the evaluation transform as a processor of transformers: resize, centre crop, normalise."""
    channels = int(metadata["in_chans"])
    if not {"mean", "std"} <= metadata.keys():
        if channels != len(IMAGENET_DEFAULT_MEAN):
            log.warning("%s records no mean and std: preprocessor_config.json is not written", where)
            return None
        log.warning("%s records no mean and std: preprocessor_config.json has those of ImageNet", where)
    mean = json.loads(metadata.get("mean", json.dumps(IMAGENET_DEFAULT_MEAN)))
    std = json.loads(metadata.get("std", json.dumps(IMAGENET_DEFAULT_STD)))
    return {
        "image_processor_type": "BitImageProcessor",  # the one with a centre crop after a resize of the short side
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {
            "shortest_edge": int(image_size / float(metadata.get("eval_crop_ratio", 0.875)) + 1e-6)
        },  # as EvalTransform
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
