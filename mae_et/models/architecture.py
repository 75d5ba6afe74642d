"""The architecture of a ViT as its tensors show it. Names are timm's; see mae_et/storage/plain.py for the form.

Shapes: D width, M cls tokens, R registers, h hidden width of the MLPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mae_et.errors import CheckpointError
from mae_et.models.sizes import MAE_SIZES, ratio_of

# The shapes of tensors do not determine the number of heads. These are the published values for each width.
NUM_HEADS: Mapping[int, int] = {dims.embed_dim: dims.num_heads for dims in MAE_SIZES.values()}
NUM_DECODER_HEADS: Mapping[int, int] = {dims.decoder_embed_dim: dims.decoder_num_heads for dims in MAE_SIZES.values()}
# DINOv3 and its variants: heads of 64 channels, of 128 in the 7B model.
_ROTARY_HEADS: Mapping[int, int] = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 20, 1536: 24, 4096: 32}
PATCHES = "patch_embed.proj.weight"
DECODER = ("mask_token", "decoder_")
CLASSIFIER = ("head.", "fc_norm.")
ROTARY = "blocks.0.attn.q_bias"  # only timm's Eva, the class of rotary positions, has this tensor
# Epsilon of the LayerNorms in files that do not record it: DINOv3 and its ports have another one than MAE and DINOv2.
NORM_EPS: Mapping[bool, float] = {False: 1e-6, True: 1e-5}  # by rotary positions


def num_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """Returns one more than the highest block number after a prefix such as `blocks.`; 0 if there is none."""
    numbers = (key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix))
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def count_registers(state: Mapping[str, Tensor]) -> int:
    """Returns the number of registers in a state with timm's names."""
    return state["reg_token"].shape[1] if "reg_token" in state else 0


def count_cls_tokens(state: Mapping[str, Tensor]) -> int:
    """Returns the number of cls tokens in a state with timm's names; 1 if there is none."""
    return state["cls_token"].shape[1] if "cls_token" in state else 1


def mlp_of(state: Mapping[str, Tensor], stack: str = "blocks.") -> tuple[str, float]:
    """Returns the kind of the MLPs ("gelu" or "swiglu") and their hidden width h over D; ("gelu", 4) if there are none.

    Args:
        state: a SwiGLU has gate and value in one layer `fc1` of 2 h outputs.
        stack: prefix of the blocks.
    """
    first, last = (state.get(f"{stack}0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if first is None or first.ndim != 2:
        return "gelu", 4.0
    rows, width = first.shape
    hidden = rows if last is None or last.ndim != 2 else last.shape[1]
    return "swiglu" if rows == 2 * hidden else "gelu", ratio_of(hidden, width)


def is_rotary(state: Mapping[str, Tensor]) -> bool:
    """Returns whether the encoder has the rotary positions of DINOv3, and so no position table."""
    return ROTARY in state and "pos_embed" not in state


def encoder_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the architecture of an encoder, as arguments of `random_vit` and `MaskedAutoencoder`; without the heads.

    Args:
        state: has a patch projection [D, C, p, p].
    """
    width, channels, patch, _ = state[PATCHES].shape
    mlp, mlp_ratio = mlp_of(state)
    return {
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": width,
        "depth": num_blocks(state, "blocks."),
        "mlp": mlp,
        "mlp_ratio": mlp_ratio,
        "num_cls_tokens": count_cls_tokens(state),
        "num_registers": count_registers(state),
        "rotary_positions": is_rotary(state),
    }


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a file that differ from those of a config or model, both as from `encoder_options`.

    The ratio of the MLPs is among them if their kind is, because its default depends on the kind.
    """
    other_mlp = found["mlp"] != wanted["mlp"]
    return {
        name: value for name, value in found.items() if value != wanted[name] or (name == "mlp_ratio" and other_mlp)
    }


def recorded_eps(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> float:
    """Returns the epsilon of the LayerNorms that a file records, else the published one."""
    return float(metadata.get("norm_eps", NORM_EPS[is_rotary(state)]))


def published_heads(state: Mapping[str, Tensor]) -> Mapping[int, int]:
    """Returns the published number of heads for each width of ViTs with the positions of this one."""
    return _ROTARY_HEADS if is_rotary(state) else NUM_HEADS


def known_num_heads(
    width: int, where: str, given: int | None, recorded: str | None, table: Mapping[int, int], name: str
) -> int:
    """Returns the number of heads: as given, else as recorded in the file, else as published for the width.

    Args:
        width: of the tokens.
        where: the file, for messages.
        given: by the caller.
        recorded: from the metadata, as text.
        table: width -> heads.
        name: of the argument, for messages.
    Raises:
        CheckpointError: if none of the three is available, or the number does not divide the width.
    """
    heads = given if given is not None else int(recorded) if recorded else table.get(width)
    if heads is None:
        raise CheckpointError(
            f"{where} has width {width} and does not record its number of attention heads: set {name} "
            f"(known by width: {', '.join(f'{w}: {h}' for w, h in table.items())})"
        )
    if heads < 1 or width % heads:
        raise CheckpointError(f"{where}: {name} = {heads} does not divide the width {width}: set {name} to a divisor")
    return heads
