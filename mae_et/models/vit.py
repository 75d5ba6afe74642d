"""timm's ViT as the encoder of an MAE: with weights from any file at any input size, or with random weights.

Encoders with rotary positions (DINOv3) are timm's Eva, all others its VisionTransformer.

Shapes: C channels, H x W px image size, p patch size, gh x gw = H/p x W/p grid, L = gh gw patches, D width, M cls tokens,
R registers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_et.errors import CheckpointError, UserError
from mae_et.models.architecture import (
    CLASSIFIER,
    DECODER,
    NORM_EPS,
    PATCHES,
    encoder_options,
    known_num_heads,
    num_blocks,
    published_heads,
    recorded_eps,
)
from mae_et.models.blocks import mlp_arguments
from mae_et.models.cls_tokens import ManyClsTokens, split_cls_tokens
from mae_et.models.pos_embed import sincos_pos_embed
from mae_et.models.position_table import fit_position_embedding, recorded_grid, with_register_rows
from mae_et.models.sizes import MAE_SIZES, Size, as_size, nearest_size, size_text
from mae_et.models.strict import misfit

log = logging.getLogger(__name__)

CHANNEL_RULES = ("none", "average", "inflate")
HEAD_STD = 2e-5
# Arguments of Eva that make it a DINOv3. Its attention layers have no bias of the keys, as theirs.
ROTARY_OPTIONS: Mapping[str, Any] = {
    "use_abs_pos_emb": False,
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "rope_temperature": 100.0,
    "rope_rotate_half": True,
}


def random_vit(
    image_size: int | Size,
    size: str = "base",
    *,
    patch_size: int | None = None,
    in_chans: int = 3,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp: str | None = None,
    mlp_ratio: float | None = None,
    norm_eps: float | None = None,
    drop_path_rate: float = 0.0,
    global_pool: str = "token",
    num_classes: int = 0,
    num_cls_tokens: int = 1,
    num_registers: int = 0,
    rotary_positions: bool = False,
) -> VisionTransformer:
    """Builds a ViT with the initial weights of an MAE's encoder, the baseline for all pre-trained weights.

    Args:
        image_size: px, the side of a square or (H, W); multiples of p.
        size: a size of `MAE_SIZES`.
        patch_size: p in px; None here and below: the value of the size.
        in_chans: C.
        embed_dim, depth, num_heads: of the encoder; D is a multiple of 4 and of num_heads.
        mlp: "gelu" or "swiglu".
        mlp_ratio: hidden width of the MLPs divided by D.
        norm_eps: epsilon of the LayerNorms; None: 1e-6, or 1e-5 with rotary positions.
        drop_path_rate: of the last block; the rate rises linearly from 0.
        global_pool: "token": cls token after the final norm, or the mean of several; "avg": mean of the patches, followed by
            a norm.
        num_classes: of the head; 0: no head.
        num_cls_tokens: M; more than one make a `ManyClsTokens`.
        num_registers: R, timm's `reg_tokens`.
        rotary_positions: queries and keys of the patches are rotated as in DINOv3; there is no position table.
    Returns:
        A model whose `forward_features` returns [N, M + R + L, D]. The position embedding is the sine-cosine table of the
        input, stored as a parameter as in timm. The head starts near zero (std 2e-5).
    Raises:
        ValueError: if the size is unknown, or the arguments do not fit each other.
    Source: MAE (arXiv 2111.06377), initialisation of its encoder and of its fine-tuning head.
    """
    if size not in MAE_SIZES:
        raise UserError(f"unknown size {size!r}; known: {', '.join(MAE_SIZES)}")
    dims = MAE_SIZES[size]
    patch, width, heads = patch_size or dims.patch_size, embed_dim or dims.embed_dim, num_heads or dims.num_heads
    check_multiple(image_size, patch)
    if width % heads or width % 4:
        raise ValueError(f"embed_dim = {width} must be a multiple of 4 and of num_heads = {heads}")
    if global_pool not in ("token", "avg"):
        raise ValueError(f"global_pool = {global_pool!r} must be 'token' or 'avg'")
    if rotary_positions and num_cls_tokens > 1:
        raise ValueError(f"num_cls_tokens = {num_cls_tokens} must be 1 with rotary_positions = True")
    plain_vit = partial(_plain_vit, num_cls_tokens=num_cls_tokens)
    build: Callable[..., VisionTransformer] = _rotary_vit if rotary_positions else plain_vit
    model = build(
        mlp or dims.mlp,
        mlp_ratio or dims.mlp_ratio,
        num_registers,
        img_size=image_size,
        patch_size=patch,
        in_chans=in_chans,
        num_classes=num_classes,
        global_pool=global_pool,
        embed_dim=width,
        depth=depth or dims.depth,
        num_heads=heads,
        drop_path_rate=drop_path_rate,
        norm_layer=partial(nn.LayerNorm, eps=norm_eps or NORM_EPS[rotary_positions]),
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.view(width, -1))  # as a matrix
    nn.init.normal_(model.cls_token, std=0.02)  # type: ignore[arg-type]
    if not rotary_positions:
        num_more = num_cls_tokens - 1 + num_registers
        table = with_register_rows(sincos_pos_embed(width, model.patch_embed.grid_size), num_more)
        with torch.no_grad():
            model.pos_embed.copy_(table)  # type: ignore[union-attr]
    if model.reg_token is not None:
        nn.init.normal_(model.reg_token, std=0.02)
    if num_classes:
        nn.init.trunc_normal_(model.head.weight, std=HEAD_STD)  # type: ignore[arg-type]
    return model


def _plain_vit(
    mlp: str, mlp_ratio: float, num_registers: int, num_cls_tokens: int, **options: Any
) -> VisionTransformer:
    options |= {**mlp_arguments(mlp, options["embed_dim"], mlp_ratio), "weight_init": "skip"}
    if num_cls_tokens == 1:
        return VisionTransformer(reg_tokens=num_registers, **options)
    return ManyClsTokens(num_cls_tokens, reg_tokens=num_cls_tokens - 1 + num_registers, **options)


def _rotary_vit(mlp: str, mlp_ratio: float, num_registers: int, **options: Any) -> VisionTransformer:
    options |= {
        **ROTARY_OPTIONS,
        "mlp_ratio": mlp_ratio,
        "swiglu_mlp": mlp == "swiglu",
        "num_reg_tokens": num_registers,
    }
    return cast(VisionTransformer, Eva(**options))  # it has the methods and attributes that callers use


def check_multiple(image_size: int | Size, patch_size: int, of: str = "") -> None:
    """Checks that both sides of an image are multiples of the patch size.

    Args:
        image_size: px, the side of a square or (H, W).
        patch_size: px.
        of: whose patch size it is, e.g. " of FILE", for the message.
    Raises:
        UserError: with the nearest size.
    """
    size = as_size(image_size)
    if any(side < patch_size or side % patch_size for side in size):
        near = size_text(nearest_size(size, patch_size))
        raise UserError(
            f"image_size = {size_text(size)} is not a multiple of the patch size {patch_size}{of}; the nearest is {near}"
        )


def vit_from_state(
    state: Mapping[str, Tensor],
    image_size: int | Size,
    *,
    metadata: Mapping[str, str] | None = None,
    where: str = "the file",
    patch_size: int | None = None,
    in_chans: int | None = None,
    num_heads: int | None = None,
    adapt_channels: str = "none",
    drop_path_rate: float = 0.0,
    global_pool: str = "token",
    num_classes: int = 0,
) -> VisionTransformer:
    """Builds the ViT that a state dict describes and loads every tensor of it.

    Width, depth, MLP, patch size and channels follow from the tensors. Decoders and classifiers in the state are left
    out, which is logged. A fixed sine-cosine position table is recomputed for the input size; a learnt one is resampled.

    Args:
        state: names as in timm and the official MAE, in the form of mae_et/storage/plain.py.
        image_size: px, side or (H, W); may differ from the size of the training.
        metadata: `num_heads` as text, required for a width that `published_heads` does not list; `norm_eps` if it is not the
            published one; `image_size` as JSON, required for a learnt position table of a grid that is not square.
        where: the file, for messages.
        patch_size, in_chans: what the caller needs; None: as in the state.
        num_heads: overrides the metadata.
        adapt_channels: how the patch projection is changed to `in_chans`; see `adapt_patch_channels`.
        drop_path_rate, global_pool, num_classes: as in `random_vit`. With "avg" the norm after the mean is new and the
            final norm of the state is left out, as in MAE's fine-tuning.
    Raises:
        CheckpointError: if tensors are missing, unexpected or of another shape, or the state is not a ViT. The message
            names them.
        ValueError: if image_size is not a multiple of the patch size.
    """
    encoder = {key: value for key, value in state.items() if not key.startswith((*DECODER, *CLASSIFIER))}
    _check_is_vit(state, encoder, where, metadata or {})
    if in_chans is not None:
        encoder[PATCHES] = adapt_patch_channels(encoder[PATCHES], in_chans, adapt_channels, where)
    _, _, patch, other_side = encoder[PATCHES].shape
    if patch != other_side:
        raise CheckpointError(f"{where} has patches of {patch} x {other_side} px; only square patches are supported")
    if patch_size not in (None, patch):
        raise CheckpointError(
            f"{where} has patch_size = {patch}, not {patch_size}: set patch_size to {patch}, or choose another file"
        )
    options = encoder_options(encoder)
    width, recorded_heads = options["embed_dim"], (metadata or {}).get("num_heads")
    model = random_vit(
        image_size,
        **options,
        num_heads=known_num_heads(width, where, num_heads, recorded_heads, published_heads(encoder), "num_heads"),
        norm_eps=recorded_eps(encoder, metadata or {}),
        drop_path_rate=drop_path_rate,
        global_pool=global_pool,
        num_classes=num_classes,
    )
    if global_pool == "avg":
        encoder = {key: value for key, value in encoder.items() if not key.startswith("norm.")}
    if left_out := [key for key in state if key not in encoder]:
        kinds = sorted({key.split(".")[0].split("_")[0] for key in left_out})
        log.info("%s: left out %d tensors outside the encoder (%s)", where, len(left_out), ", ".join(kinds))
    if "pos_embed" in encoder:
        grid_size = model.patch_embed.grid_size
        recorded = recorded_grid(state, metadata or {})
        fitted = fit_position_embedding(encoder["pos_embed"], grid_size, width, where, recorded)
        encoder["pos_embed"] = with_register_rows(fitted, options["num_cls_tokens"] - 1 + options["num_registers"])
    encoder = split_cls_tokens(encoder)
    _load_strictly(model, encoder, where)
    return model


def adapt_patch_channels(kernel: Tensor, in_chans: int, rule: str, where: str = "the file") -> Tensor:
    """Returns the kernel of the patch projection for another number of channels.

    Both rules multiply by C_old / C_new, so that the scale of the output stays the same.

    Args:
        kernel: [D, C_old, p, p].
        in_chans: C_new.
        rule: "average": each new channel gets the mean over the old channels, so images whose channels are equal give the
            same tokens as before; "inflate": the old channels are repeated in order, so 4 channels get those of R, G, B
            and R (only for C_new > C_old); "none": another number of channels is an error.
        where: the file, for messages.
    Returns:
        [D, C_new, p, p]; the kernel itself if the numbers are equal.
    Raises:
        CheckpointError: if the numbers differ and the rule does not apply.
        ValueError: if the rule is unknown.
    """
    if rule not in CHANNEL_RULES:
        raise UserError(f"adapt_channels = {rule!r} must be one of {', '.join(CHANNEL_RULES)}")
    old = kernel.shape[1]
    if old == in_chans:
        return kernel
    if rule == "none":
        options = "'average' or 'inflate'" if in_chans > old else "'average'"
        raise CheckpointError(
            f"{where} has in_chans = {old}, not {in_chans}: set in_chans to {old}, or set adapt_channels to {options} to "
            "change the patch projection"
        )
    if rule == "inflate" and in_chans < old:
        raise CheckpointError(
            f"{where} has {old} channels, and adapt_channels = 'inflate' cannot reduce them to {in_chans}: use 'average'"
        )
    log.warning("%s: the patch projection was changed from %d to %d channels (%s)", where, old, in_chans, rule)
    if rule == "average":
        changed = kernel.mean(dim=1, keepdim=True).expand(-1, in_chans, -1, -1)
    else:
        changed = kernel[:, torch.arange(in_chans) % old]
    return changed * (old / in_chans)


def _check_is_vit(
    state: Mapping[str, Tensor], encoder: Mapping[str, Tensor], where: str, metadata: Mapping[str, str]
) -> None:
    kernel = encoder.get(PATCHES)
    if kernel is not None and kernel.ndim == 4 and num_blocks(encoder, "blocks."):
        return
    if metadata.get("objective") == "supervised":
        raise CheckpointError(
            f"{where} holds a {metadata.get('architecture', 'model')} of a supervised training, and this needs a ViT: "
            "fine-tune it with `mae-et supervised` and model.init_from, or export it with `mae-et export --layout onnx`"
        )
    some = ", ".join(list(state)[:4])
    if not encoder and any(key.startswith(DECODER) for key in state):
        what = f"holds only the decoder of an MAE ({some}, ...)"
    else:
        what = f"holds no ViT in a known layout ({len(state)} tensors: {some}{', ...' if len(state) > 4 else ''})"
    raise CheckpointError(f"{where} {what}: choose a backbone file, a checkpoint of a run or an official MAE")


def _load_strictly(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    own: dict[str, Any] = {key: value for key, value in model.state_dict().items() if not key.startswith(CLASSIFIER)}
    faults = misfit(state, own)
    if not faults:
        model.load_state_dict(state, strict=False)
        return
    missing = set(faults.keys_missing)
    hint = "only plain ViTs are supported: with a cls token, with biases, with norms before attention and MLP"
    if missing <= {"norm.weight", "norm.bias"} and not faults.unexpected and not faults.other_shape:
        hint = "the file is a classifier on the mean of the patches: use global_pool='avg', which needs no final norm"
    elif "cls_token" in missing and missing <= {"cls_token", "norm.weight", "norm.bias"}:
        hint = "the layout 'mmdet' leaves these out: export the source again with layout 'timm'"
    raise CheckpointError(f"{where} does not fit the ViT: {faults}. {hint[0].upper()}{hint[1:]}")
