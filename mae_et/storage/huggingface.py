"""Writes folders that the transformers library loads: ViTMAEForPreTraining, ViTForImageClassification or ViTModel."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from mae_et.errors import CheckpointError, UserError
from mae_et.models.architecture import (
    DECODER,
    NUM_DECODER_HEADS,
    NUM_HEADS,
    PATCHES,
    known_num_heads,
    num_blocks,
)
from mae_et.models.position_table import recorded_grid, table_grid
from mae_et.models.strict import some
from mae_et.storage.atomic import atomic_path
from mae_et.storage.backbone import read_backbone, write_safetensors
from mae_et.storage.digest import encoder_digest
from mae_et.storage.layouts import check_plain, to_layout
from mae_et.storage.metadata import architecture_of
from mae_et.storage.weights import find_weights

log = logging.getLogger(__name__)

_BLOCK = re.compile(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)$")
_LAYERS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_OTHERS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_HEAD = ("head.weight", "head.bias")


def export_hugging_face(
    source: str | Path, folder: str | Path, entry: str | None = None, num_heads: int | None = None
) -> dict[str, str]:
    """Writes `config.json`, `model.safetensors` and `preprocessor_config.json`.

    A source with a decoder for pixels becomes a ViTMAEForPreTraining, a classifier on the cls token a
    ViTForImageClassification, anything else a ViTModel. The names are those of the files on the hub, which transformers 4
    and 5 read.

    Args:
        source, entry: as for `read_weights`.
        folder: to write to. It is created if it is absent; files of these names are replaced.
        num_heads: of the encoder; None: from the metadata, or known by the width.
    Returns:
        The metadata of `model.safetensors`, with the name of the class in `hugging_face_class`.
    Raises:
        CheckpointError: if the source has tensors without a place in these classes, or lacks some.
        UserError: if `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: layout 'huggingface' writes a folder, choose another OUT")
    source = find_weights(source, with_decoder=True)
    where = str(source)
    state, metadata = read_backbone(source, entry)
    if "norm.weight" not in state and "fc_norm.weight" in state:
        raise CheckpointError(
            f"{where} is a classifier on the mean of the patches, and ViTForImageClassification uses the cls token: export it "
            "as 'onnx', or its encoder as 'timm'"
        )
    name = _class_of(state, metadata, where)
    kept = _tensors_of(name, state, where)
    metadata = {
        **architecture_of(state), **encoder_digest(state), **metadata,
        "source": source.name, "layout": "huggingface", "hugging_face_class": name,
    }  # fmt: skip
    metadata.pop("tensors_sha256", None)  # of the source; the writer adds that of the renamed tensors
    config = _config(name, kept, metadata, where, num_heads)
    metadata["num_heads"] = json.dumps(config["num_attention_heads"])
    processor = _processor(metadata, config["image_size"], where)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(_renamed(kept, "" if name == "ViTModel" else "vit."), folder / "model.safetensors", metadata)
    _write_json(folder / "config.json", config)
    if processor is not None:
        _write_json(folder / "preprocessor_config.json", processor)
    return metadata


def _class_of(state: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> str:
    if "decoder_pred.weight" in state:
        if metadata.get("target") == "hog":
            log.warning("%s predicts HOG descriptors, which ViTMAE cannot: the decoder is left out", where)
            return "ViTModel"
        if "target" not in metadata:
            log.warning("%s does not record its target: config.json says norm_pix_loss = false", where)
        return "ViTMAEForPreTraining"
    return "ViTForImageClassification" if set(_HEAD) <= state.keys() else "ViTModel"


def _tensors_of(name: str, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns the tensors of the class under timm's names, after the checks of `to_layout`."""
    check_plain(state, name, where)
    classifier = name == "ViTForImageClassification"
    head = {key: state[key] for key in _HEAD} if classifier else {}
    body = {key: value for key, value in state.items() if key not in head}
    kept = to_layout(body, "mae" if name == "ViTMAEForPreTraining" else "timm", where) | head
    if "fc_norm.weight" in kept:
        raise CheckpointError(f"{where} has both norm and fc_norm, and a ViT of Hugging Face has one final norm")
    decoder = [key for key in state if key.startswith(DECODER) and key not in kept]
    if decoder and name == "ViTModel":
        log.info("%s: left out %d tensors of the decoder: %s", where, len(decoder), some(decoder))
    return kept


def _config(
    name: str, state: Mapping[str, Tensor], metadata: Mapping[str, str], where: str, num_heads: int | None
) -> dict[str, Any]:
    width, channels, patch, other_side = state[PATCHES].shape
    rows, columns = table_grid(state["pos_embed"], width, where, recorded_grid(state, metadata))
    if patch != other_side or rows != columns:
        raise CheckpointError(
            f"{where} has no square patches and square grid, which Hugging Face's config.json requires: its patches have {patch} "
            f"x {other_side} px, its grid {rows} x {columns}. Export it in layout 'timm' or 'onnx'"
        )
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": "vit_mae" if name == "ViTMAEForPreTraining" else "vit",
        "hidden_size": width,
        "num_hidden_layers": num_blocks(state, "blocks."),
        "num_attention_heads": known_num_heads(
            width, where, num_heads, metadata.get("num_heads"), NUM_HEADS, "num_heads"
        ),
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": float(metadata.get("norm_eps", 1e-6)),
        "image_size": rows * patch,
        "patch_size": patch,
        "num_channels": channels,
        "qkv_bias": True,
        "dtype": "float32",
    }
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


def _renamed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Renames timm's names to those of Hugging Face's files and splits the joined projections of attention."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in _OTHERS:
            renamed[prefix + _OTHERS[key]] = value
        elif key in _HEAD:
            renamed[f"classifier.{key.removeprefix('head.')}"] = value
        elif (found := _BLOCK.match(key)) is None:  # the decoder outside its blocks
            renamed[f"decoder.{key}"] = value
        else:
            in_decoder, number, layer, part = found.groups()
            stack = f"decoder.decoder_layers.{number}" if in_decoder else f"{prefix}encoder.layer.{number}"
            if layer == "attn.qkv":
                for name, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    renamed[f"{stack}.attention.attention.{name}.{part}"] = third
            else:
                renamed[f"{stack}.{_LAYERS[layer]}.{part}"] = value
    return renamed


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
