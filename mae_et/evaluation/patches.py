"""What patch features and attention look like: principal components, cosine similarity, attention of the cls token.

Shapes: n images, gh x gw patches, D width, H heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae_et.errors import UserError

LOW, HIGH = 0.01, 0.99  # quantiles of a component that become 0 and 1


class Colors(NamedTuple):
    """Principal components as colours."""

    pictures: Tensor  # [n, 3, gh, gw] in [0, 1]
    shares: list[float]  # of the variance, of the three components


def principal_colors(features: Tensor) -> Colors:
    """Shows the first three principal components of patch features as red, green and blue.

    All images share one mean, one set of components and one scale, so equal colours mean equal values in all of them. The
    sign of a component is chosen so that its largest loading by absolute value is positive. Of each component the 1 % quantile
    over all patches becomes 0 and the 99 % quantile becomes 1; values outside are clipped. Nothing separates foreground
    from background.

    Args:
        features: [n, gh, gw, D].
    Raises:
        UserError: if there are fewer than three dimensions.
    """
    if features.shape[-1] < 3:
        raise UserError(f"the features have {features.shape[-1]} dimensions; three colours need 3 or more")
    rows = features.reshape(-1, features.shape[-1]).double()
    rows = rows - rows.mean(dim=0)
    variances, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))  # ascending
    vectors, variances = vectors.flip(1), variances.flip(0).clamp(min=0)
    vectors = vectors[:, :3]
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    values = rows @ (vectors * largest.sign())
    # torch.quantile takes at most 16 million values.
    low, high = (values.kthvalue(1 + round(q * (len(values) - 1)), dim=0).values for q in (LOW, HIGH))
    scaled = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()
    total = float(variances.sum())
    shares = [float(v) / total if total else 0.0 for v in variances[:3]]
    return Colors(scaled.reshape(*features.shape[:3], 3).permute(0, 3, 1, 2), shares)


def similarity_maps(features: Tensor, patch: tuple[int, int]) -> Tensor:
    """Returns the cosine similarity of a patch of the first image with every patch of all images.

    Args:
        features: [n, gh, gw, D].
        patch: (row, column) from 0, of the first image.
    Returns:
        [n, gh, gw] in [-1, 1].
    Raises:
        UserError: if there is no such patch.
    """
    rows, columns = features.shape[1:3]
    if not (0 <= patch[0] < rows and 0 <= patch[1] < columns):
        raise UserError(
            f"patch {patch[0]} {patch[1]} does not exist: rows are 0 to {rows - 1}, columns 0 to {columns - 1}"
        )
    unit = F.normalize(features.float(), dim=-1)
    return unit @ unit[0, patch[0], patch[1]]


def cls_attention(model: Any, images: Tensor, block: int = -1) -> Tensor:
    """Returns the attention of the cls token to the patches, the mean of those of several cls tokens.

    Args:
        model: timm's VisionTransformer or Eva with a cls token, in eval mode.
        images: [n, C, S, S] normalised.
        block: index of the block; negative ones count from the last.
    Returns:
        [n, H, gh, gw]: softmax weights. They sum to 1 less the weights of the cls token itself and of registers.
    Raises:
        UserError: if the model has no cls token, or no such block.
    """
    if not isinstance(model, (VisionTransformer, Eva)) or model.cls_token is None:
        raise UserError(
            f"{type(model).__name__} has no cls token: attention is shown for ViTs with one. Use pca or similarity"
        )
    if not -len(model.blocks) <= block < len(model.blocks):
        raise UserError(f"block {block} does not exist: the encoder has blocks 0 to {len(model.blocks) - 1}")
    layer: Any = model.blocks[block].attn
    inputs: list[tuple[Tensor, Tensor | None]] = []
    hook = layer.register_forward_pre_hook(
        lambda _, arguments, options: inputs.append((arguments[0], options.get("rope"))), with_kwargs=True
    )
    try:
        model.forward_features(images)
    finally:
        hook.remove()
    query, key = _query_and_key(layer, *inputs[0])
    query = query[:, :, : getattr(model, "num_cls_tokens", 1)]
    weights = (query @ key.transpose(-2, -1) * layer.scale).float().softmax(dim=-1).mean(dim=2)
    return weights[:, :, model.num_prefix_tokens :].unflatten(-1, tuple(model.patch_embed.grid_size))


def _query_and_key(layer: Any, tokens: Tensor, rotations: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the queries and keys of an attention layer of timm as its forward pass computes them.

    The queries are not rotated: only that of the cls token is used, which has no position.

    Args:
        layer: the Attention of a VisionTransformer or the EvaAttention or AttentionRope of an Eva.
        tokens: [n, T, D], its input.
        rotations: of the patches, its argument `rope`; None: positions are not rotary.
    Returns:
        Two of [n, H, T, D / H].
    """
    if layer.qkv is None:
        query, key = layer.q_proj(tokens), layer.k_proj(tokens)
    else:
        joined = layer.qkv(tokens)
        if getattr(layer, "q_bias", None) is not None:
            joined = joined + torch.cat([layer.q_bias, layer.k_bias, layer.v_bias])
        query, key, _ = joined.chunk(3, dim=-1)
    query, key = (x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x in (query, key))
    query, key = layer.q_norm(query), layer.k_norm(key)
    if rotations is not None:
        prefix, patches = key[:, :, : layer.num_prefix_tokens], key[:, :, layer.num_prefix_tokens :]
        rotated = apply_rot_embed_cat(patches, rotations, half=layer.rotate_half)
        key = torch.cat([prefix, rotated], dim=2).type_as(query)
    return query, key
