"""Names of ViTs and MAEs in other libraries, and their conversion from and to timm's names.

timm's names are the common form: the encoder has the names of timm's ViT, the decoder those of the official MAE.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mae_et.errors import CheckpointError, UserError
from mae_et.models.architecture import (
    CLASSIFIER,
    DECODER,
    PATCHES,
    count_cls_tokens,
    count_registers,
    is_rotary,
    mlp_of,
    num_blocks,
)
from mae_et.models.cls_tokens import split_cls_tokens
from mae_et.models.position_table import with_register_rows
from mae_et.models.strict import some
from mae_et.storage.plain import joined_attention, without_empty_bias_tables

log = logging.getLogger(__name__)

# Layout -> the suffixes that the target library reads, and the entries of a torch file that hold the state.
# mmengine and mmseg read `state_dict`; ViTDet's own loader and the official MAE read `model`.
LAYOUTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "timm": ((".safetensors", ".pth", ".pt"), ("model",)),
    "mae": ((".safetensors", ".pth", ".pt"), ("model",)),
    "mmdet": ((".pth", ".pt"), ("model", "state_dict")),
    "mmseg": ((".pth", ".pt"), ("state_dict",)),
}

# Wrappers of torch (DDP, compile, activation checkpointing, FSDP) add these parts to names.
_WRAPPERS = re.compile(
    r"(^|\.)(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)(?=\.)"
)
# First parts of names that frameworks add to all parameters of a model.
_OWNERS = ("model", "backbone", "encoder", "student", "teacher", "net", "network", "online_encoder", "base_encoder")
_AVERAGES = re.compile(r"ema|teacher|momentum|target_|average|shadow", re.IGNORECASE)

_TIMM, _MM, _HF = PATCHES, "patch_embed.projection.weight", "embeddings.patch_embeddings.projection.weight"
_HF_DINOV3 = "embeddings.patch_embeddings.weight"

_LIBRARY = {_TIMM: "DINO", _MM: "OpenMMLab", _HF: "Hugging Face", _HF_DINOV3: "Hugging Face"}
# Names of an MAE's decoder, which stands beside the prefix of the encoder.
_DECODER_OF = {
    _MM: re.compile(r"neck\.(mask_token$|decoder_|ln1\.|norm1\.)"),
    _HF: re.compile(r"decoder\.(mask_token$|decoder_)"),
}
_NOTHING = re.compile(r"(?!)")

_LAYER = r"(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
_ENCODER_NAME = re.compile(
    r"(cls_token|reg_token|pos_embed|(patch_embed\.proj|norm)\.(weight|bias)"
    rf"|blocks\.\d+\.({_LAYER}|attn\.[qv]_bias))$"
)
_DECODER_NAME = re.compile(
    rf"(mask_token|decoder_pos_embed|decoder_(embed|norm|pred)\.(weight|bias)|decoder_blocks\.\d+\.{_LAYER})$"
)

# Regular expressions, applied in order to names without the prefix of the encoder.
_FROM_MM = (
    (r"^neck\.(ln1|norm1|decoder_norm)\.", "decoder_norm."),
    (r"^neck\.", ""),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^(ln1|norm1)\.", "norm."),
    (r"^layers\.", "blocks."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"\.attn\.attn\.in_proj_", ".attn.qkv."),  # mmseg's VisionTransformer, of torch's MultiheadAttention
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.(?:attn\.|ffn\.)?gamma_?([12])(?:\.weight)?$", r".ls\1.gamma"),
)
_FROM_DINO = (  # the original releases of DINOv2 and DINOv3, which otherwise have timm's names
    (r"^(register|storage)_tokens$", "reg_token"),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks in chunks, as DINOv2 trains them
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_FROM_HF = (
    (r"^decoder\.decoder_(layers|encoder\.layer)\.", "decoder_blocks."),  # before and since transformers 5
    (r"^decoder\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^(encoder\.layer|layers|layer|model\.layer)\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),  # this and the next three: modules of transformers 5
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),  # this and the next five: DINOv2 and DINOv3
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
)
_TO_MMSEG = (
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^norm\.", "ln1."),
    (r"^blocks\.", "layers."),
    (r"\.norm([12])\.", r".ln\1."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
)


def from_layout(state: Mapping[str, Tensor], where: str, entry: str | None = None) -> dict[str, Tensor]:
    """Renames a state dict to timm's names where its layout is known. Wrapper parts and common prefixes are removed.

    Everything that is removed, left out or chosen is logged.

    Args:
        state: names of timm, the official MAE, DINOv2, DINOv3, mmdetection, mmsegmentation, mmpretrain or Hugging Face, or of
            any model.
        where: the file, for messages.
        entry: prefix of the encoder to take where the state holds several; None: not a moving average.
    Returns:
        The state. Names of an unknown layout stay as they are, without wrapper parts and common prefix.
    Raises:
        CheckpointError: if two names become equal, or there is no encoder with the prefix `entry`.
    """
    state = _rename(state, lambda key: _WRAPPERS.sub("", key).lstrip("."), where, "wrapper parts of names")
    layout, prefixes = _find_encoders(state)
    if layout is None:
        if entry is not None:
            raise CheckpointError(f"{where} holds no entry {entry!r} and no encoder with this prefix")
        return _without_common_prefix(state, where)
    prefix = _choose_prefix(prefixes, where, entry)
    kept = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if prefix:
        owner = "".join(f"{part}." for part in prefix.split(".")[:-2])  # "model." of "model.vit."
        names = {key: key.removeprefix(owner) for key in state if key.startswith(owner)}
        pattern = _DECODER_OF.get(layout, _NOTHING)
        decoder = {name: state[key] for key, name in names.items() if pattern.match(name)}
        log.info("%s: removed the prefix %r from names", where, prefix)
        others = [key for key in state if not key.startswith(prefix) and names.get(key) not in decoder]
        if others:
            log.warning("%s: left out %d tensors outside %r: %s", where, len(others), prefix, some(others))
        kept |= decoder
    rules = {_TIMM: _FROM_DINO, _MM: _FROM_MM}.get(layout, _FROM_HF)
    renamed = _rename(kept, lambda key: _substitute(key, rules), where, f"names of {_LIBRARY[layout]}")
    if layout == _TIMM:
        return renamed
    return joined_attention(without_empty_bias_tables(renamed, where), where, may_lack_bias=layout == _HF_DINOV3)


def to_layout(state: Mapping[str, Tensor], layout: str, where: str = "the file") -> dict[str, Tensor]:
    """Converts a state dict to the names of a library.

    Args:
        state: in the form of mae_et/storage/plain.py. A classification head is left out, which is logged.
        layout: "timm": VisionTransformer; "mae": the official MAE, with the decoder; "mmdet": the ViTDet backbone, without
            cls token and final norm; "mmseg": the MAE backbone of mmsegmentation.
        where: the file, for messages.
    Returns:
        The tensors. A classifier on the mean of the patches has `fc_norm` in place of `norm`.
    Raises:
        CheckpointError: if tensors are missing, or the layout has no place for some.
        ValueError: if the layout is unknown.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if PATCHES not in state or not num_blocks(state, "blocks."):
        raise CheckpointError(f"{where} holds no encoder to export ({len(state)} tensors: {some(list(state))})")
    mean_pooled = "norm.weight" not in state and "fc_norm.weight" in state
    head = [key for key in state if key.startswith("head." if mean_pooled else CLASSIFIER)]
    body = {key: value for key, value in state.items() if key not in head}
    foreign = [
        key for key in body if not (_ENCODER_NAME.match(key) or _DECODER_NAME.match(key) or key.startswith("fc_norm."))
    ]
    if foreign:
        raise CheckpointError(
            f"{where} cannot be exported: a plain ViT has no place for {len(foreign)} tensors ({some(foreign)})"
        )
    if layout != "timm":
        check_plain(body, f"layout {layout!r}", where, registers=layout == "mae")
    encoder = {key: value for key, value in body.items() if not key.startswith(DECODER)}
    if layout in ("mmdet", "mmseg"):
        encoder = {key: value for key, value in encoder.items() if not key.startswith("fc_norm.")}
    if layout == "mmdet":
        encoder = {key: value for key, value in encoder.items() if key != "cls_token" and not key.startswith("norm.")}
    if missing := _missing(body, layout, mean_pooled):
        hint = "export from a checkpoint of the run" if any(key.startswith(DECODER) for key in missing) else (
            "export from the source of this file, or choose another layout"
        )  # fmt: skip
        raise CheckpointError(f"{where} cannot be exported as {layout!r}: it lacks {some(missing)}; {hint}")
    if head:
        log.warning("%s: left out the classification head: %s", where, some(head))
    if layout == "mae":
        return body
    if layout == "timm":
        encoder = split_cls_tokens(encoder)
        if "pos_embed" in encoder:
            encoder["pos_embed"] = with_register_rows(encoder["pos_embed"], count_registers(encoder))
    if layout != "mmseg":
        return encoder
    renamed = {_substitute(key, _TO_MMSEG): value for key, value in encoder.items()}
    # mmseg's blocks have layer scales, which its config starts below 1: the file sets them to 1.
    for block in range(num_blocks(encoder, "blocks.")):
        for name in ("gamma_1", "gamma_2"):
            renamed[f"layers.{block}.{name}"] = torch.ones_like(encoder[f"blocks.{block}.norm1.weight"])
    return renamed


def is_average(name: str) -> bool:
    """Returns whether a name denotes a moving average of weights, such as "model_ema" or "teacher"."""
    return bool(_AVERAGES.search(name))


def check_plain(state: Mapping[str, Tensor], target: str, where: str, registers: bool = False) -> None:
    """Checks that an encoder is a ViT as MAE has it.

    Args:
        state: in the form of mae_et/storage/plain.py.
        target: what it would become, for the message.
        where: the file, for the message.
        registers: allow registers and several cls tokens.
    Raises:
        CheckpointError: if it has rotary positions, SwiGLUs, registers or several cls tokens.
    """
    for what, option in beyond_mae(state).items():
        if not (registers and option.startswith("num_")):
            raise CheckpointError(
                f"{where} has {what}, for which {target} has no place: export it in layout 'timm', or pre-train with "
                f"model.{option}"
            )


def beyond_mae(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns what an encoder has that the published MAE does not: its name -> the option of a model without it.

    Args:
        state: in the form of mae_et/storage/plain.py.
    """
    number, num_cls_tokens = count_registers(state), count_cls_tokens(state)
    found = (
        ("rotary positions", is_rotary(state), "rotary_positions = False"),
        ("SwiGLUs as MLPs", mlp_of(state)[0] == "swiglu", "mlp = 'gelu'"),
        (f"{number} register{'s' if number > 1 else ''}", bool(number), "num_registers = 0"),
        (f"{num_cls_tokens} cls tokens", num_cls_tokens > 1, "num_cls_tokens = 1"),
    )
    return {what: option for what, is_so, option in found if is_so}


def _missing(state: Mapping[str, Tensor], layout: str, mean_pooled: bool) -> list[str]:
    rotary = is_rotary(state)
    pairs = ["patch_embed.proj"]
    if layout == "mae" or (layout == "timm" and not mean_pooled):
        pairs.append("norm")
    tables = [] if rotary else ["pos_embed"]
    if layout != "mmdet":
        tables.append("cls_token")
    stacks = ["blocks."]
    if layout == "mae":
        tables += ["mask_token", "decoder_pos_embed"]
        pairs += ["decoder_embed", "decoder_norm", "decoder_pred"]
        stacks.append("decoder_blocks.")
    layers = ("norm1", *(() if rotary else ("attn.qkv",)), "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    names = [f"{stack}{i}." for stack in stacks for i in range(num_blocks(state, stack))]
    pairs += [f"{name}{layer}" for name in names for layer in layers]
    if rotary:
        tables += [f"{name}attn.{part}" for name in names for part in ("qkv.weight", "q_bias", "v_bias")]
    return [
        key
        for key in (*tables, *(f"{pair}.{part}" for pair in pairs for part in ("weight", "bias")))
        if key not in state
    ]


def _find_encoders(state: Mapping[str, Tensor]) -> tuple[str | None, list[str]]:
    """Returns the layout, as the name of its patch projection, and the prefixes of all encoders in it."""
    for layout, first_blocks in (
        (_HF, ("encoder.layer.0.", "layers.0.attention.")),
        (_HF_DINOV3, ("layer.0.attention.", "model.layer.0.attention.")),
        (_TIMM, ("blocks.0.",)),
        (_MM, ("layers.0.ln1.",)),
    ):
        # Other backbones also have a patch projection, but no plain stack of blocks beside it.
        prefixes = [key.removesuffix(layout) for key in state if f".{key}".endswith(f".{layout}")]
        prefixes = [
            prefix
            for prefix in prefixes
            if any(key.startswith(tuple(prefix + block for block in first_blocks)) for key in state)
        ]
        if prefixes:
            return layout, prefixes
    return None, []


def _choose_prefix(prefixes: Sequence[str], where: str, entry: str | None) -> str:
    if entry is not None:
        found = [prefix for prefix in prefixes if f"{entry}.".startswith(prefix) or prefix.startswith(f"{entry}.")]
        if not found:
            names = ", ".join(repr(prefix.rstrip(".")) for prefix in prefixes)
            raise CheckpointError(f"{where} holds no entry {entry!r}; its encoders have the prefixes {names}")
        return found[0]
    chosen = min(prefixes, key=is_average)
    if len(prefixes) > 1:
        others = ", ".join(prefix.rstrip(".") for prefix in prefixes if prefix != chosen)
        log.warning(
            "%s holds several encoders: using %r. To use another (%s), write it to a file of its own: "
            "mae-et export %s OUT.safetensors --entry NAME", where, chosen.rstrip("."), others, where,
        )  # fmt: skip
    return chosen


def _without_common_prefix(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    removed = ""
    while True:
        firsts = {key.split(".")[0] for key in state}
        first = next(iter(firsts))
        if len(firsts) > 1 or first not in _OWNERS or any("." not in key for key in state):
            break
        removed += f"{first}."
        state = {key.removeprefix(f"{first}."): value for key, value in state.items()}
    if removed:
        log.info("%s: removed the prefix %r from names", where, removed)
    return state


def _rename(state: Mapping[str, Tensor], rename: Callable[[str], str], where: str, what: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if (new := rename(key)) in renamed:
            raise CheckpointError(f"{where}: {what} are ambiguous: two tensors would be named {new}, one of them {key}")
        renamed[new] = value
    if (changed := sum(key not in state for key in renamed)) and what.startswith("wrapper"):
        log.info("%s: removed %s from %d tensors", where, what, changed)
    elif changed:
        log.info("%s: converted %s to timm's", where, what)
    return renamed


def _substitute(key: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
