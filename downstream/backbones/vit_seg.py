"""A plain ViT for UperNet: maps from four blocks of the encoder, each rescaled to its own stride.

Shapes: N images, C channels, H x W px, p patch side, gh x gw = ceil(H / p) x ceil(W / p) patches, D width.
Source: UperNet on a plain ViT as in BEiT (arXiv 2106.08254) and MAE (arXiv 2111.06377).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from downstream.backbones.plain_vit import ChannelLayerNorm, PlainViT
from mae_et.errors import UserError

NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "SyncBN": nn.SyncBatchNorm,
    "BN": nn.BatchNorm2d,
    "LN": ChannelLayerNorm,
}


@MODELS.register_module()
class ViTSeg(PlainViT):
    """Computes the maps after some blocks of a ViT with global attention and a cls token.

    State names are those of timm, without the final norm, and with `rescale.*`.

    Args:
        img_size: px of the stored position table, i.e. of training; inputs of any size work.
        out_indices: blocks (from 0) after which the maps are taken, in rising order; None: the last of each quarter, except
            for depth 12, where the recipe uses 3, 5, 7, 11.
        rescales: factors 4, 2, 1 or 0.5, one for each map; None: maps stay at stride p.
        norm_cfg: the norm inside the enlargement by 4: dict(type="SyncBN"), "BN" or "LN".
        **options: see `PlainViT`.
    """

    has_cls_token = True
    new_parameters = ("rescale.",)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 512,
        out_indices: Sequence[int] | None = None,
        rescales: Sequence[float] | None = (4, 2, 1, 0.5),
        norm_cfg: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(img_size, **options)
        if out_indices is None:
            quarters = [max(0, self.depth * (i + 1) // 4 - 1) for i in range(4)]
            out_indices = (3, 5, 7, 11) if self.depth == 12 else quarters
        self.out_indices = tuple(out_indices)
        if not self.out_indices or list(self.out_indices) != sorted(set(self.out_indices) & set(range(self.depth))):
            raise UserError(
                f"backbone.out_indices = {list(self.out_indices)} must rise and lie between 0 and {self.depth - 1}"
            )
        norm = str((norm_cfg or {"type": "LN"}).get("type"))
        factors = [1] * len(self.out_indices) if rescales is None else list(rescales)
        if len(factors) != len(self.out_indices) or not set(factors) <= {4, 2, 1, 0.5} or norm not in NORMS:
            raise UserError(
                f"backbone.rescales = {factors} must be 4, 2, 1 or 0.5 for each of the {len(self.out_indices)} maps, and "
                f"norm_cfg = {norm_cfg} of type {', '.join(NORMS)}"
            )
        self.blocks = nn.ModuleList(
            Block(self.embed_dim, self.num_heads, qkv_bias=True, **self.block_options(i)) for i in range(self.depth)
        )
        self.rescale = nn.ModuleList(_rescale(factor, self.embed_dim, NORMS[norm]) for factor in factors)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps [N, C, H, W] to one [N, D, gh * factor, gw * factor] for each tap."""
        patches, cls_token = self.embed(images)
        assert cls_token is not None
        num, rows, columns, dim = patches.shape
        maps: list[Tensor] = []
        x = torch.cat([cls_token, patches.flatten(1, 2)], dim=1)
        for index in range(self.out_indices[-1] + 1):
            x = self.run_block(index, x)
            if index in self.out_indices:
                tap = x[:, 1:].transpose(1, 2).reshape(num, dim, rows, columns)
                maps.append(self.rescale[len(maps)](tap))
        return tuple(maps)


def _rescale(factor: float, dim: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    if factor == 4:
        return nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2), norm(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)
        )
    if factor == 2:
        return nn.ConvTranspose2d(dim, dim, 2, 2)
    return nn.Identity() if factor == 1 else nn.MaxPool2d(2, 2, ceil_mode=True)
