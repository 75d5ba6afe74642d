"""timm's ViT as the encoder of an MAE: from anybody's weights at any input size, or at random.

Shapes: C channels, S image_size px, p patch side, L = (S/p)^2 patches, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_et.errors import CheckpointError, UserError
from mae_et.models.pos_embed import is_sincos_table, sincos_pos_embed
from mae_et.models.strict import misfit

log = logging.getLogger(__name__)

# Tensors do not tell the number of heads; these are the published ViTs and the small ones of config.MAE_SIZES.
NUM_HEADS: Mapping[int, int] = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
NUM_DECODER_HEADS: Mapping[int, int] = {128: 4, 256: 8, 512: 16}
HEAD_STD = 2e-5
_DECODER = ("mask_token", "decoder_")
_CLASSIFIER = ("head.", "fc_norm.")


def random_vit(
    image_size: int,
    *,
    patch_size: int = 16,
    in_chans: int = 3,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    drop_path_rate: float = 0.0,
    global_pool: str = "token",
    num_classes: int = 0,
) -> VisionTransformer:
    """Builds a ViT with the initial weights of an MAE's encoder; the baseline of everything that was learnt.

    Args:
        image_size: S in px, a multiple of p.
        patch_size: p in px.
        in_chans: C.
        embed_dim, depth, num_heads: the encoder; D is a multiple of 4 and of num_heads.
        mlp_ratio: hidden width of the MLPs over D.
        drop_path_rate: of the last block; rises linearly from 0.
        global_pool: "token": cls token after the final norm; "avg": mean of the patches, with a norm of its own after.
        num_classes: of the head; 0: none.
    Returns:
        A model whose `forward_features` gives [N, 1 + L, D]. The position embedding is the sine-cosine table of the
        input, a parameter as everywhere in timm; the head starts near zero (std 2e-5).
    Raises:
        ValueError: if the sizes do not fit each other.
    Source: MAE (arXiv 2111.06377), initialisation of its encoder and of its fine-tuning head.
    """
    if image_size < patch_size or image_size % patch_size:
        near = max(patch_size, round(image_size / patch_size) * patch_size)
        raise UserError(
            f"image_size = {image_size} is no multiple of the patch size {patch_size}; the nearest is {near}"
        )
    if embed_dim % num_heads or embed_dim % 4:
        raise ValueError(f"embed_dim = {embed_dim} must be a multiple of 4 and of num_heads = {num_heads}")
    if global_pool not in ("token", "avg"):
        raise ValueError(f"global_pool = {global_pool!r} must be 'token' or 'avg'")
    model = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        global_pool=global_pool,  # type: ignore[arg-type]
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        drop_path_rate=drop_path_rate,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        weight_init="skip",
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.view(embed_dim, -1))  # seen as a matrix
    nn.init.normal_(model.cls_token, std=0.02)  # type: ignore[arg-type]
    with torch.no_grad():
        model.pos_embed.copy_(sincos_pos_embed(embed_dim, model.patch_embed.grid_size))  # type: ignore[union-attr]
    if num_classes:
        nn.init.trunc_normal_(model.head.weight, std=HEAD_STD)  # type: ignore[arg-type]
    return model


def vit_from_state(
    state: Mapping[str, Tensor],
    image_size: int,
    *,
    metadata: Mapping[str, str] | None = None,
    where: str = "the file",
    patch_size: int | None = None,
    in_chans: int | None = None,
    num_heads: int | None = None,
    drop_path_rate: float = 0.0,
    global_pool: str = "token",
    num_classes: int = 0,
) -> VisionTransformer:
    """Builds the ViT that a state dict describes and loads it, every tensor accounted for.

    Width, depth, MLP, patch and channels are read off the tensors. Decoders and classifiers in the state are left out,
    which is logged. A fixed sine-cosine position table is computed anew for the input; a learnt one is resampled.
    Args:
        state: names as in timm and the official MAE.
        image_size: S in px, whatever the weights were trained at.
        metadata: `num_heads` as text; wanted for a width that NUM_HEADS does not know.
        where: the file, for messages.
        patch_size, in_chans: what the caller relies on; None: whatever the state has.
        num_heads: goes before the metadata.
        drop_path_rate, global_pool, num_classes: as in `random_vit`. With "avg" the norm after the mean is new and the
            state's final norm is left out, as in MAE's fine-tuning.
    Raises:
        CheckpointError: naming what is missing, unexpected or of another shape, or what the state holds instead of a ViT.
        ValueError: if image_size is no multiple of the patch size.
    """
    encoder = {key: value for key, value in state.items() if not key.startswith((*_DECODER, *_CLASSIFIER))}
    _check_is_vit(state, encoder, where)
    width, channels, patch, other_side = encoder["patch_embed.proj.weight"].shape
    if patch != other_side:
        raise CheckpointError(f"{where} has patches of {patch} x {other_side} px; only square ones can be used")
    for name, wanted, found in (("patch_size", patch_size, patch), ("in_chans", in_chans, channels)):
        if wanted not in (None, found):
            raise CheckpointError(
                f"{where} has {name} = {found}, not {wanted}; leave {name} to the file, or choose another"
            )
    heads = known_num_heads(width, where, num_heads, (metadata or {}).get("num_heads"), NUM_HEADS, "num_heads")
    hidden = encoder.get("blocks.0.mlp.fc1.weight")
    model = random_vit(
        image_size,
        patch_size=patch,
        in_chans=channels,
        embed_dim=width,
        depth=num_blocks(encoder, "blocks."),
        num_heads=heads,
        mlp_ratio=4.0 if hidden is None else (hidden.shape[0] + 0.5) / width,  # timm rounds down
        drop_path_rate=drop_path_rate,
        global_pool=global_pool,
        num_classes=num_classes,
    )
    if global_pool == "avg":
        encoder = {key: value for key, value in encoder.items() if not key.startswith("norm.")}
    if left_out := [key for key in state if key not in encoder]:
        kinds = sorted({key.split(".")[0].split("_")[0] for key in left_out})
        log.info("%s: %d tensors are no part of the encoder and left out (%s)", where, len(left_out), ", ".join(kinds))
    if "pos_embed" in encoder:
        grid_size = model.patch_embed.grid_size
        encoder["pos_embed"] = fit_position_embedding(encoder["pos_embed"], grid_size, width, where)
    _load_strictly(model, encoder, where)
    return model


def fit_position_embedding(
    table: Tensor, grid_size: tuple[int, int], embed_dim: int, where: str = "the file"
) -> Tensor:
    """Returns the position embedding for another grid.

    Args:
        table: [1, 1 + s s, D] of a square grid, the cls token's first.
        grid_size: (gh, gw) wanted, in patches.
        embed_dim: D.
        where: the file, for the message.
    Returns:
        [1, 1 + gh gw, D]: computed anew if the table is the fixed sine-cosine one, else resampled (bicubic).
    Raises:
        CheckpointError: if the table has no such shape.
    """
    side = round((table.shape[1] - 1) ** 0.5) if table.ndim == 3 else 0
    if side < 1 or table.shape != (1, 1 + side * side, embed_dim):
        raise CheckpointError(
            f"{where}: pos_embed {tuple(table.shape)} is no table of a cls token and a square grid at width {embed_dim}"
        )
    if is_sincos_table(table):
        return sincos_pos_embed(embed_dim, grid_size)
    if (side, side) != tuple(grid_size):
        log.info("%s: the learnt position embedding goes from %d x %d to %d x %d", where, side, side, *grid_size)
    return resample_abs_pos_embed(table.float(), list(grid_size), [side, side], num_prefix_tokens=1)


def num_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """Returns one more than the highest block number after a prefix such as `blocks.`; 0 where there is none."""
    numbers = (key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix))
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def known_num_heads(
    width: int, where: str, given: int | None, recorded: str | None, table: Mapping[int, int], name: str
) -> int:
    """Returns the number of heads: what the caller gave, else what the file records, else that of the published width.

    Args:
        width: of the tokens.
        where: the file, for the message.
        given: by the caller.
        recorded: the file's metadata, as text.
        table: width -> heads.
        name: of the argument, for the message.
    Raises:
        CheckpointError: if none of the three says it, or it does not divide the width.
    """
    heads = given if given is not None else int(recorded) if recorded else table.get(width)
    if heads is None:
        raise CheckpointError(
            f"{where} has width {width} and does not say how many attention heads; give {name} "
            f"(known by width: {', '.join(f'{w}: {h}' for w, h in table.items())})"
        )
    if heads < 1 or width % heads:
        raise CheckpointError(f"{where}: {name} = {heads} does not divide the width {width}; give the right {name}")
    return heads


def _check_is_vit(state: Mapping[str, Tensor], encoder: Mapping[str, Tensor], where: str) -> None:
    kernel = encoder.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4 and num_blocks(encoder, "blocks."):
        return
    some = ", ".join(list(state)[:4])
    if not encoder and any(key.startswith(_DECODER) for key in state):
        what = f"holds only the decoder of an MAE ({some}, ...)"
    elif "patch_embed.projection.weight" in state:
        what = (
            f"has the names of mmsegmentation's ViT ({some}, ...); write it in timm's layout: export with layout 'timm'"
        )
    else:
        what = f"holds no ViT in timm's names ({len(state)} tensors: {some}{', ...' if len(state) > 4 else ''})"
    raise CheckpointError(f"{where} {what}; give a backbone file, a run's checkpoint or an official MAE")


def _load_strictly(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    own: dict[str, Any] = {key: value for key, value in model.state_dict().items() if not key.startswith(_CLASSIFIER)}
    faults = misfit(state, own)
    if not faults:
        model.load_state_dict(state, strict=False)
        return
    missing = set(faults.keys_missing)
    hint = "only plain ViTs can be used, with a cls token, biases and norms before attention and MLP"
    if missing <= {"norm.weight", "norm.bias"} and not faults.unexpected and not faults.other_shape:
        hint = "it comes from a classifier on the mean of the patches; global_pool='avg' needs no final norm"
    elif "cls_token" in missing and missing <= {"cls_token", "norm.weight", "norm.bias"}:
        hint = "the layout for ViTDet leaves these out; export with layout 'timm'"
    raise CheckpointError(f"{where} does not fit the ViT: {faults}. {hint[0].upper()}{hint[1:]}")
