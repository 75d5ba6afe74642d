"""ViTDet: a plain ViT with windowed attention, and a feature pyramid from its last map.

Shapes: N images, C channels, H x W px, p patch side, gh x gw = ceil(H / p) x ceil(W / p) patches, D width.
Source: ViTDet (arXiv 2203.16527).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from downstream.backbones.attention import GridBlock
from downstream.backbones.plain_vit import ChannelLayerNorm, PlainViT
from mae_et.errors import UserError


@MODELS.register_module()
class ViTDet(PlainViT):
    """Computes one map with a ViT whose blocks attend within windows, except for a few global ones.

    State names are those of timm, without cls token and final norm, and with `attn.rel_pos_h` and `attn.rel_pos_w`.

    Args:
        img_size: px of the stored position tables, i.e. of training; inputs of any size work.
        window_size: side of the windows in patches; 0: all attention is global.
        global_blocks: indices of the blocks that attend globally; None: the last of each quarter.
        relative_positions: add decomposed relative positions, zero at the start.
        **options: see `PlainViT`.
    """

    new_parameters = ("rel_pos_h", "rel_pos_w")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 1024,
        window_size: int = 14,
        global_blocks: Sequence[int] | None = None,
        relative_positions: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(img_size, **options)
        if global_blocks is None:
            global_blocks = sorted({self.depth * (quarter + 1) // 4 - 1 for quarter in range(4)} - {-1})
        if window_size < 0 or not all(0 <= index < self.depth for index in global_blocks):
            raise UserError(
                f"backbone.window_size = {window_size} must be 0 or more and global_blocks = {list(global_blocks)} "
                f"between 0 and {self.depth - 1}"
            )
        blocks = []
        for index in range(self.depth):
            side = 0 if index in global_blocks else window_size
            table_size = (side, side) if side else self.grid_size
            blocks.append(
                GridBlock(
                    self.embed_dim,
                    self.num_heads,
                    side,
                    table_size if relative_positions else None,
                    **self.block_options(index),
                )
            )
        self.blocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Returns one map: [N, C, H, W] -> ([N, D, gh, gw],)."""
        x, _ = self.embed(images)
        for index in range(self.depth):
            x = self.run_block(index, x)
        return (x.permute(0, 3, 1, 2).contiguous(),)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Makes maps at strides p/4, p/2, p, 2p, ... from a map at stride p, by deconvolution and pooling.

    Args:
        in_channels: D.
        out_channels: channels of each map.
        num_outs: number of maps; each after the fourth is pooled from the one before.
    """

    def __init__(
        self, in_channels: int, out_channels: int = 256, num_outs: int = 5, init_cfg: dict[str, Any] | None = None
    ) -> None:
        super().__init__(init_cfg)
        if in_channels % 4 or num_outs < 4:
            raise UserError(
                f"neck: in_channels = {in_channels} must be a multiple of 4, num_outs = {num_outs} at least 4"
            )
        half, quarter = in_channels // 2, in_channels // 4
        self.num_outs = num_outs
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(in_channels, half, 2, 2),
                    ChannelLayerNorm(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, 2),
                ),
                nn.ConvTranspose2d(in_channels, half, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, 2, ceil_mode=True),  # a map of one row still has one
            ]
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, bias=False),
                ChannelLayerNorm(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                ChannelLayerNorm(out_channels),
            )
            for channels in (quarter, half, in_channels, in_channels)
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps ([N, D, gh, gw],) to num_outs maps of out_channels."""
        (x,) = inputs
        maps = [output(scale(x)) for scale, output in zip(self.scales, self.outputs, strict=True)]
        while len(maps) < self.num_outs:
            maps.append(F.max_pool2d(maps[-1], 1, 2))
        return tuple(maps)


MODELS.register_module(name="ChannelLayerNorm", module=ChannelLayerNorm)
