"""The transformer blocks of encoder and decoder. State names equal timm's.

Shapes: N images, T tokens, D or E width, h heads of d = D / h channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import SwiGLUPacked
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae_et.models.attention import attend
from mae_et.models.sizes import ratio_of


def layer_norm(eps: float) -> Any:
    """Returns a constructor of LayerNorms."""
    return partial(nn.LayerNorm, eps=eps)


def mlp_arguments(mlp: str, width: int, mlp_ratio: float) -> dict[str, Any]:
    """Returns arguments of timm's Block and VisionTransformer.

    Args:
        mlp: "gelu" or "swiglu"; a SwiGLU has gate and value in one layer `fc1`, as in DINOv2.
        width: of the tokens.
        mlp_ratio: hidden width over `width`.
    Raises:
        ValueError: if the kind is unknown.
    """
    if mlp == "gelu":
        return {"mlp_ratio": mlp_ratio}
    if mlp != "swiglu":
        raise ValueError(f"mlp = {mlp!r} must be 'gelu' or 'swiglu'")
    both = 2 * int(width * mlp_ratio)  # timm counts gate and value together
    return {"mlp_ratio": ratio_of(both, width), "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}


def plain_blocks(
    kind: type[Block], depth: int, dim: int, num_heads: int, mlp: str, mlp_ratio: float, norm: Any
) -> nn.ModuleList:
    """Builds pre-norm blocks.

    Args:
        kind: Block or DecoderBlock.
        depth: number of blocks.
        dim: D or E.
        num_heads: h.
        mlp, mlp_ratio: as for `mlp_arguments`.
        norm: constructor of the LayerNorms.
    """
    arguments = mlp_arguments(mlp, dim, mlp_ratio)
    return nn.ModuleList(kind(dim, num_heads, qkv_bias=True, norm_layer=norm, **arguments) for _ in range(depth))


def rotary_blocks(
    depth: int, dim: int, num_heads: int, mlp: str, mlp_ratio: float, norm: Any, num_prefix: int
) -> nn.ModuleList:
    """Builds the blocks of DINOv3, which take the rotations of the patches as their second argument.

    Args:
        depth, dim, num_heads, mlp, mlp_ratio, norm: as for `plain_blocks`.
        num_prefix: tokens before the patches, which are not rotated.
    """
    if mlp not in ("gelu", "swiglu"):
        raise ValueError(f"mlp = {mlp!r} must be 'gelu' or 'swiglu'")
    return nn.ModuleList(
        EvaBlock(
            dim,
            num_heads,
            mlp_ratio=mlp_ratio,
            swiglu_mlp=mlp == "swiglu",
            num_prefix_tokens=num_prefix,
            rotate_half=True,
            norm_layer=norm,
        )
        for _ in range(depth)
    )


class DecoderBlock(Block):
    """A pre-norm transformer block that can compute its output for the last tokens only. State names equal timm's."""

    def forward(self, tokens: Tensor, num_last: int | None = None) -> Tensor:  # type: ignore[override]
        """Runs the block.

        Args:
            tokens: [N, T, E].
            num_last: queries come from this many last tokens, keys and values from all tokens; None: all tokens.
        Returns:
            [N, T, E], or [N, num_last, E].
        """
        if num_last is None:
            return super().forward(tokens)
        attention: Any = self.attn
        n, _, dim = tokens.shape
        heads, width = attention.num_heads, dim // attention.num_heads
        normed = self.norm1(tokens)
        weight, bias = attention.qkv.weight, attention.qkv.bias
        query = F.linear(normed[:, -num_last:], weight[:dim], bias[:dim])
        key, value = F.linear(normed, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        query, key, value = (t.view(n, -1, heads, width).transpose(1, 2) for t in (query, key, value))
        mixed = attend(attention, query, key, value).transpose(1, 2).reshape(n, num_last, dim)
        last = tokens[:, -num_last:] + attention.proj(mixed)
        return last + self.mlp(self.norm2(last))
