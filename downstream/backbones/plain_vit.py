"""The common base of the ViTs for detection and segmentation: patches, positions for any input size, blocks, strict loading.

Shapes: N images, C channels, H x W px, p patch side, gh x gw = ceil(H / p) x ceil(W / p) patches, D width.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from downstream.backbones.attention import is_exporting
from downstream.backbones.loading import Account, load_vit
from mae_et.errors import UserError
from mae_et.models.pos_embed import sincos_pos_embed
from mae_et.models.position_table import fit_position_embedding, table_grid

LAYER_NORM: Any = partial(nn.LayerNorm, eps=1e-6)
POSITIONS = ("interpolate", "recompute")


class ChannelLayerNorm(nn.LayerNorm):
    """Normalises the channels of [N, C, H, W] at each position."""

    def __init__(self, num_features: int, eps: float = 1e-6) -> None:
        super().__init__(num_features, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class PlainViT(BaseModule):
    """Provides everything but the blocks. A subclass sets `has_cls_token` and `new_parameters`, and makes `self.blocks`.

    Args:
        img_size: px, side or (H, W), of the stored position table; inputs of any other size resample it.
        patch_size: p in px.
        in_channels: C.
        embed_dim, depth, num_heads: of the pre-trained encoder.
        mlp_ratio: hidden width of the MLPs over D.
        drop_path_rate: rate of the last block; it rises linearly from 0.
        positions: how the fixed sine-cosine table of a file is fitted to another grid. "interpolate" stretches the pre-trained
            table, as published for ViTDet and UperNet. "recompute" computes it for the new grid. A learned table is stretched.
        resample_patches: resample the patch embedding of a file to this patch size.
        activation_checkpointing: recompute the blocks' activations in the backward pass, to save memory.
        init_cfg: dict(type="Pretrained", checkpoint=FILE) with any file that `mae_et.storage.backbone.read_backbone`
            reads; None: the initial weights of an MAE.
    """

    has_cls_token = False
    new_parameters: tuple[str, ...] = ()

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        positions: str = "interpolate",
        resample_patches: bool = False,
        activation_checkpointing: bool = False,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if positions not in POSITIONS:
            raise UserError(f"backbone.positions = {positions!r} must be one of {', '.join(POSITIONS)}")
        if embed_dim % num_heads or embed_dim % 4:
            raise UserError(f"backbone.embed_dim = {embed_dim} must be a multiple of 4 and of num_heads = {num_heads}")
        self.patch_size, self.embed_dim, self.depth, self.num_heads = patch_size, embed_dim, depth, num_heads
        self.mlp_ratio, self.drop_path_rate = mlp_ratio, drop_path_rate
        self.positions, self.resample_patches = positions, resample_patches
        self.activation_checkpointing = activation_checkpointing
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid_size = (-(-height // patch_size), -(-width // patch_size))

        self.patch_embed = PatchEmbed(
            None, patch_size, in_channels, embed_dim, strict_img_size=False, flatten=False, output_fmt="NCHW"
        )
        table = sincos_pos_embed(embed_dim, self.grid_size, cls_token=self.has_cls_token)
        self.pos_embed = nn.Parameter(table)
        if self.has_cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks: nn.ModuleList

    def block_options(self, index: int) -> dict[str, Any]:
        """Returns the options of block `index` that do not depend on the subclass."""
        rate = self.drop_path_rate * index / max(self.depth - 1, 1)
        return {"mlp_ratio": self.mlp_ratio, "drop_path": rate, "norm_layer": LAYER_NORM}

    def init_weights(self) -> None:
        """Draws an MAE's initial weights, then loads the file of `init_cfg`, if there is one.

        Raises:
            CheckpointError: if the file does not fit, naming keys and shapes.
            UserError: if init_cfg is anything but a file.
        """
        for module in [self.patch_embed, self.blocks]:
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))  # seen as a matrix
        if self.has_cls_token:
            nn.init.normal_(self.cls_token, std=0.02)
        path = checkpoint_path(self.init_cfg)
        if path is not None:
            self.load_backbone(path)
        self._is_init = True

    def load_backbone(self, path: str | Path) -> Account:
        """Loads a backbone file; see `downstream.backbones.loading.load_vit`."""
        return load_vit(self, path)

    def fit_positions(self, table: Tensor, where: str, recorded: tuple[int, int] | None = None) -> Tensor:
        """Fits the position table of a file to the stored grid.

        Args:
            table: [1, 1 + L, D], in the form of mae_et/storage/plain.py.
            where: the file, for messages.
            recorded: grid of the table by the metadata of the file; None: a square, if the table does not show its grid.
        Raises:
            CheckpointError: if the grid of the table is unknown.
        """
        fitted = fit_position_embedding(table, self.grid_size, self.embed_dim, where, recorded)
        if self.positions == "interpolate":
            grid = table_grid(table, self.embed_dim, where, recorded)
            fitted = _stretch(table.float(), self.grid_size, grid, num_prefix=1)
        return fitted if self.has_cls_token else fitted[:, 1:]

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cuts images into patches with positions.

        Args:
            images: [N, C, H, W]; zeros are added below and right up to a multiple of p.
        Returns:
            The patches [N, gh, gw, D], and the cls token [N, 1, D] where there is one.
        """
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        x = self.patch_embed.proj(images).permute(0, 2, 3, 1)
        grid_size = (x.shape[1], x.shape[2])
        table: Tensor = self.pos_embed
        num_prefix = int(self.has_cls_token)
        if is_exporting() or grid_size != self.grid_size:  # a traced comparison would fix the size
            table = _stretch(table, grid_size, self.grid_size, num_prefix)
        x = x + table[:, num_prefix:].view(1, *grid_size, self.embed_dim).to(x.dtype)
        if not num_prefix:
            return x, None
        return x, (self.cls_token + table[:, :1]).to(x.dtype).expand(x.shape[0], -1, -1)

    def run_block(self, index: int, x: Tensor) -> Tensor:
        """Runs a block; with activation checkpointing its activations are not kept."""
        block = self.blocks[index]
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


def _stretch(table: Tensor, size: tuple[int, int], stored: tuple[int, int], num_prefix: int) -> Tensor:
    """Resamples a table bicubically without antialiasing, as in the published ViTDet and UperNet.

    timm's default antialiases, which also changes enlarged tables.
    """
    return resample_abs_pos_embed(
        table, list(size), list(stored), num_prefix_tokens=num_prefix, interpolation="bicubic", antialias=False
    )


def checkpoint_path(init_cfg: dict[str, Any] | None) -> str | None:
    """Returns the file of an `init_cfg`; None if it is None.

    Raises:
        UserError: if it is another kind of initialization.
    """
    if init_cfg is None:
        return None
    kind, path = init_cfg.get("type"), init_cfg.get("checkpoint")
    if kind != "Pretrained" or not isinstance(path, str) or set(init_cfg) > {"type", "checkpoint"}:
        raise UserError(
            f"backbone.init_cfg = {dict(init_cfg)} must be dict(type='Pretrained', checkpoint=FILE), or None for random weights"
        )
    return path
