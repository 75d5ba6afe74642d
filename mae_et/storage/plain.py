"""The one form of a ViT that models here take, and the rewriting of equal forms into it.

The form has timm's names, and neither layer scales nor position rows for registers. A SwiGLU has gate and value in one layer
`fc1`. Attention has one layer `qkv`; its bias is `qkv.bias`, or with rotary positions `q_bias` and `v_bias`, because those
models have no bias of the keys. Every rewriting leaves the features as they are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mae_et.errors import CheckpointError
from mae_et.models.architecture import ROTARY, num_blocks
from mae_et.models.cls_tokens import joined_cls_tokens
from mae_et.models.position_table import recorded_grid, with_plain_table
from mae_et.models.strict import some

log = logging.getLogger(__name__)

_PERIODS = "rope_embed.periods"


def plain_vit(state: Mapping[str, Tensor], where: str, metadata: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Rewrites an encoder into the form of this module; arguments and errors are those of `scaled_vit`."""
    return without_layer_scales(scaled_vit(state, where, metadata), where)


def scaled_vit(state: Mapping[str, Tensor], where: str, metadata: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Rewrites an encoder into the form of this module, but keeps its layer scales, `blocks.N.ls1.gamma` and `ls2.gamma`.

    Args:
        state: names as from `from_layout`.
        where: the file, for messages.
        metadata: of the file; `num_cls_tokens`, `rotary_positions` and `image_size` count.
    Returns:
        The state. A state that is not a ViT stays as it is.
    Raises:
        CheckpointError: if the rotary positions of the file are not those of DINOv3, or not known to be them, or cls tokens
            are missing.
    """
    metadata = metadata or {}
    state = joined_cls_tokens(_with_packed_gates(state), int(metadata.get("num_cls_tokens", 1)), where)
    if _has_rotary_positions(state, metadata, where):
        state = _rotary_form(state, where)
    return with_plain_table(state, where, recorded_grid(state, metadata))


def layer_scales(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the layer scales of an encoder, [D] each."""
    return {key: value for key, value in state.items() if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", key)}


def without_layer_scales(state: Mapping[str, Tensor], where: str | None) -> dict[str, Tensor]:
    """Multiplies layer scales into the layers before them, which leaves all features as they are.

    Args:
        state: as from `scaled_vit`.
        where: the file, for a message; None: no message.
    """
    scales = layer_scales(state)
    if not scales:
        return dict(state)
    plain = {key: value for key, value in state.items() if key not in scales}
    for key, gamma in scales.items():
        block, _, name = key.removesuffix(".gamma").rpartition(".")
        layer = f"{block}.{'attn.proj' if name == 'ls1' else 'mlp.fc2'}"
        for part, scale in (("weight", gamma[:, None]), ("bias", gamma)):
            if f"{layer}.{part}" in plain:
                plain[f"{layer}.{part}"] = plain[f"{layer}.{part}"] * scale
    if where is not None and any(bool((gamma != 1).any()) for gamma in scales.values()):
        log.info("%s: multiplied %d layer scales into the layers before them", where, len(scales))
    return plain


def _with_packed_gates(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joins the layers `fc1_g` (gate) and `fc1_x` (value) of a SwiGLU; without a gate, `fc1_x` is the `fc1` of a plain MLP."""
    packed = {}
    for key, value in state.items():
        if ".mlp.fc1_x." in key:
            gate = state.get(key.replace(".fc1_x.", ".fc1_g."))
            packed[key.replace(".fc1_x.", ".fc1.")] = value if gate is None else torch.cat([gate, value])
        elif ".mlp.fc1_g." not in key:
            packed[key] = value
    return packed


def _has_rotary_positions(state: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> bool:
    """Returns whether a ViT has the rotary positions of DINOv3. Those of other models have the same names of tensors."""
    if "pos_embed" in state or "cls_token" not in state or not num_blocks(state, "blocks."):
        return False
    if metadata.get("rotary_positions") == "true" or _PERIODS in state:
        return True
    foreign = [key for key in state if key.startswith("rope") or ".attn.q_proj." in key]
    registers = state.get("reg_token")
    if not foreign and registers is not None and registers.shape[1]:
        return True
    if not foreign and ROTARY not in state:
        return False  # a ViT whose position table is missing
    raise CheckpointError(
        f"{where} has no position table (pos_embed) and does not show rotary positions as DINOv3 has them: it has "
        f"{some(foreign) if foreign else 'no registers, no rope_embed.periods and no record of them'}. Other rotary positions "
        "are not supported: choose another file"
    )


def _rotary_form(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Renames layer scales, splits the bias of `qkv` and drops what is fixed or used in training only."""
    _check_periods(state.get(_PERIODS), where)
    dropped = [key for key in state if key == _PERIODS or key.startswith("local_cls_norm.")]
    dropped += [key for key, value in state.items() if key == "reg_token" and not value.shape[1]]
    form: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in dropped or key.endswith(".attn.qkv.bias_mask"):
            continue
        key = re.sub(r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma", key)
        if not re.fullmatch(r"blocks\.\d+\.attn\.qkv\.bias", key):
            form[key] = value
            continue
        query, keys, values = (value * state.get(f"{key}_mask", torch.ones_like(value))).chunk(3)
        if keys.any():
            raise CheckpointError(
                f"{where}: {key} has a bias of the keys, which DINOv3 and its class in timm do not have"
            )
        attention = key.removesuffix("qkv.bias")
        form |= {f"{attention}q_bias": query, f"{attention}v_bias": values}
    without = [name for i in range(num_blocks(form, "blocks.")) if f"{(name := f'blocks.{i}.attn')}.q_bias" not in form]
    for name in without:
        if (weight := form.get(f"{name}.qkv.weight")) is not None:
            form |= {f"{name}.{part}": weight.new_zeros(len(weight) // 3) for part in ("q_bias", "v_bias")}
    if without:
        log.info("%s: %d attention layers have no bias; it starts from zeros", where, len(without))
    if dropped:
        log.info("%s: left out what is fixed or used in training only: %s", where, some(dropped))
    return form


def _check_periods(periods: Tensor | None, where: str) -> None:
    """Compares the stored periods of the rotations with those of base 100. Published files hold them in bfloat16."""
    if periods is None:
        return
    expected = 100.0 ** (torch.arange(len(periods)) / len(periods))
    if periods.ndim != 1 or not torch.allclose(periods.float(), expected, rtol=1e-2):
        raise CheckpointError(
            f"{where}: {_PERIODS} goes from {float(periods.min()):g} to {float(periods.max()):g}; only the rotary positions of "
            f"DINOv3 with base 100 are supported, which go from 1 to {float(expected.max()):g}"
        )


def joined_attention(state: dict[str, Tensor], where: str, may_lack_bias: bool = False) -> dict[str, Tensor]:
    """Joins the query, key and value projections of Hugging Face and drops what a plain encoder does not have.

    Args:
        state: timm's names but for `attn.query`, `attn.key` and `attn.value`.
        where: the file, for messages.
        may_lack_bias: the projections of DINOv3 need no bias: zeros take its place if another one has a bias.
    Raises:
        CheckpointError: if a projection is missing.
    """
    joined: dict[str, Tensor] = {}
    left_out = []
    for key, value in state.items():
        if key.startswith(("pooler.", "classifier.", "embeddings.mask_token")):
            left_out.append(key)
        elif found := re.fullmatch(r"((?:decoder_)?blocks\.\d+\.attn\.)(query|key|value)\.(weight|bias)", key):
            attention, _, kind = found.groups()
            parts = [state.get(f"{attention}{name}.{kind}") for name in ("query", "key", "value")]
            if any(part is None for part in parts) and not (may_lack_bias and kind == "bias"):
                raise CheckpointError(f"{where}: {key} has no matching key or value projection")
            joined[f"{attention}qkv.{kind}"] = torch.cat([torch.zeros_like(value) if p is None else p for p in parts])
        else:
            joined[key] = value
    if left_out:
        log.warning("%s: left out %d tensors outside the encoder: %s", where, len(left_out), some(left_out))
    return joined


def without_empty_bias_tables(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Removes mmseg's tables of relative positions where they are zero and so have no effect."""
    index = [key for key in state if key.endswith("relative_position_index")]
    zero = [key for key, value in state.items() if key.endswith("relative_position_bias_table") and not value.any()]
    if zero:
        log.info("%s: left out %d tables of relative positions, which are zero", where, len(zero))
    return {key: value for key, value in state.items() if key not in {*index, *zero}}
