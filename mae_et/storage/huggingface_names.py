"""Names of tensors in the files of transformers. They are those of the files on the hub, which transformers 4 and 5 read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mae_et.models.architecture import mlp_of

_BLOCK = re.compile(r"(decoder_)?blocks\.(\d+)\.(.+)")
_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
}
_PROJECTIONS = ("query", "key", "value")


@dataclass(frozen=True)
class _Names:
    """Holds the names of a family of classes, for timm's names of layers. Attention and gates are apart, see `_apart`."""

    block: str  # before the number
    patches: str
    norm: str
    layers: Mapping[str, str]  # of a block


_ATTENTION = {f"attn.{name}": f"attention.attention.{name}" for name in _PROJECTIONS}
_ATTENTION["attn.proj"] = "attention.output.dense"
_SCALES = {"norm1": "norm1", "norm2": "norm2", "ls1": "layer_scale1", "ls2": "layer_scale2"}
_VIT = _Names(
    block="encoder.layer",
    patches="embeddings.patch_embeddings.projection",
    norm="layernorm",
    layers={
        **_ATTENTION,
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
)
_PIXIO = _Names(
    block=_VIT.block, patches=_VIT.patches, norm=_VIT.norm, layers={**_VIT.layers, "norm1": "norm1", "norm2": "norm2"}
)
_DINOV2 = _Names(
    block=_VIT.block,
    patches=_VIT.patches,
    norm=_VIT.norm,
    layers={**_ATTENTION, **_SCALES, "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
)
_DINOV2_SWIGLU = _Names(
    block=_VIT.block,
    patches=_VIT.patches,
    norm=_VIT.norm,
    layers={**_ATTENTION, **_SCALES, "mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"},
)
_DINOV3 = _Names(
    block="layer",
    patches="embeddings.patch_embeddings",
    norm="norm",
    layers={
        **_SCALES,
        **{f"attn.{name}": f"attention.{name[0]}_proj" for name in _PROJECTIONS},
        "attn.proj": "attention.o_proj",
        "mlp.fc1_g": "mlp.gate_proj",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    },
)


def hugging_face_names(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Renames the tensors of a ViT or MAE to those of a class of transformers.

    Args:
        state: in the form of mae_et/storage/plain.py, also with layer scales, decoder and head.
        name: of the class.
    """
    names, prefix = _VIT, "" if name.endswith("Model") else "vit."
    if name == "DINOv3ViTModel":
        names = _DINOV3
    elif name == "PixioModel":
        names = _PIXIO
    elif name.startswith("Dinov2"):
        names = _DINOV2_SWIGLU if mlp_of(state)[0] == "swiglu" else _DINOV2
    outer = {"patch_embed.proj": prefix + names.patches, "norm": prefix + names.norm, "head": "classifier"}
    renamed: dict[str, Tensor] = {}
    for key, value in _apart(state, gates="mlp.fc1_g" in names.layers and mlp_of(state)[0] == "swiglu").items():
        module, _, part = key.rpartition(".")
        if key in _EMBEDDINGS:
            renamed[prefix + _EMBEDDINGS[key]] = value
        elif module in outer:
            renamed[f"{outer[module]}.{part}"] = value
        elif (found := _BLOCK.fullmatch(module)) is None:  # the decoder outside its blocks
            renamed[f"decoder.{key}"] = value
        else:
            in_decoder, number, layer = found.groups()
            block = "decoder.decoder_layers" if in_decoder else prefix + names.block
            renamed[f"{block}.{number}.{names.layers[layer]}.{'lambda1' if part == 'gamma' else part}"] = value
    return renamed


def _apart(state: Mapping[str, Tensor], gates: bool) -> dict[str, Tensor]:
    """Splits the joined projections of attention and, with `gates`, `fc1` of SwiGLUs into `fc1_g` (gate) and `fc1` (value)."""
    apart: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, part = key.rpartition(".")
        if module.endswith(".attn.qkv"):
            for name, third in zip(_PROJECTIONS, value.chunk(3), strict=True):
                apart[f"{module.removesuffix('qkv')}{name}.{part}"] = third
        elif part in ("q_bias", "v_bias"):
            apart[f"{module}.{'query' if part == 'q_bias' else 'value'}.bias"] = value
        elif gates and module.endswith(".mlp.fc1"):
            apart[f"{module}_g.{part}"], apart[key] = value.chunk(2)
        else:
            apart[key] = value
    return apart
