"""Pyramid Vision Transformer, version 1 (timm's pvt_v2 is another model). Importing this file registers it with timm.

Parameter names are those of the published checkpoints.

Shapes: N images, stage i has an h x w grid of D channels, L = h w tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    Mlp,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    global_pool_nlc,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models.pvt_v2 import Attention
from torch import Tensor, nn

from mae_et.models.resize import check_input_size

__all__ = ["PVT"]  # register_model adds the functions
NUM_STAGES = 4
STRIDES = (4, 8, 16, 32)
REDUCTIONS = (8, 4, 2, 1)  # side of the patches of keys and values; their grid is B / 32 in each stage
WIDTHS = (64, 128, 320, 512)
NUM_HEADS = (1, 2, 5, 8)
MLP_RATIOS = (8, 8, 4, 4)


class Block(nn.Module):
    """Attends to keys and values of a reduced map, then applies an MLP; both with a norm before and a residual.

    Args:
        dim: D.
        num_heads: of D / num_heads channels each.
        mlp_ratio: hidden width of the MLP divided by D.
        reduction: side of the patches that become one key and value each.
        drop_path: rate of both residual branches.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, sr_ratio=reduction)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, x: Tensor, grid_size: list[int]) -> Tensor:
        """Maps [N, L (+ 1), D] to the same shape. A class token is possible where the reduction is 1."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid_size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PVT(nn.Module):
    """PVT v1 with timm's interface. The position embedding of each stage depends on the input size.

    Args:
        img_size: side of the images in px, or (height, width); multiples of 32.
        in_chans: channels of the images.
        num_classes: of the head; 0: no head.
        global_pool: "token": the class token; "avg", "max", "avgmax": of the patches of the last stage; "": none.
        depths: number of blocks of each stage.
        drop_rate: dropout before the head.
        drop_path_rate: of the last block; the rate rises linearly from 0.
        dynamic_img_size: take images of any size that is a multiple of 32: the forward pass resamples the position
            embeddings (bicubic).
    Raises:
        UserError: if img_size is not a multiple of 32.
    Source: Pyramid Vision Transformer (arXiv 2102.12122).
    """

    size_multiple = 32

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        depths: Sequence[int] = (2, 2, 2, 2),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.dynamic_img_size, self.img_size = dynamic_img_size, self._checked(img_size)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.feature_info: list[dict[str, Any]] = []
        for i, dim in enumerate(WIDTHS):
            patches = PatchEmbed(
                img_size=self._input_of(i),
                patch_size=2 if i else 4,
                in_chans=WIDTHS[i - 1] if i else in_chans,
                embed_dim=dim,
                norm_layer=partial(nn.LayerNorm, eps=1e-5),
                output_fmt="NHWC",
                strict_img_size=not dynamic_img_size,
            )
            num_tokens = patches.num_patches + (i == NUM_STAGES - 1)
            blocks = [Block(dim, NUM_HEADS[i], MLP_RATIOS[i], REDUCTIONS[i], rate) for rate in rates[i]]
            setattr(self, f"patch_embed{i + 1}", patches)
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(torch.zeros(1, num_tokens, dim)))
            setattr(self, f"block{i + 1}", nn.ModuleList(blocks))
            self.feature_info.append({"num_chs": dim, "reduction": STRIDES[i], "module": f"block{i + 1}"})
        self.cls_token: nn.Parameter | None = nn.Parameter(torch.zeros(1, 1, dim))
        self.num_features = self.head_hidden_size = dim
        self.norm: nn.Module = nn.LayerNorm(dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.num_stages, self.grad_checkpointing = NUM_STAGES, False
        for i in range(NUM_STAGES):
            trunc_normal_(getattr(self, f"pos_embed{i + 1}"), std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_weights)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Changes the size of the images in px: the position embeddings are resampled (bicubic) and replaced.

        Raises:
            UserError: if it is not a multiple of 32.
        """
        self.img_size = self._checked(img_size)
        for i in range(self.num_stages):
            patches, table = self._patches(i), self._table(i)
            old = patches.grid_size
            patches.set_input_size(img_size=self._input_of(i))
            if patches.grid_size != old:
                resized = self._resampled(i, patches.grid_size, old)
                setattr(self, f"pos_embed{i + 1}", nn.Parameter(resized.detach(), requires_grad=table.requires_grad))
        update_model_input_size(self, self.img_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the names of matrices that do not decay. The position embeddings decay, as published."""
        return {"cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns the layers for layer decay: the first embedding, then each block; or each stage with `coarse`."""
        stem = r"^(?:patch_embed1|pos_embed1)(?:\.|$)"
        later = r"^(?:patch_embed|pos_embed)([2-4])(?:\.|$)"
        if coarse:
            return {"stem": stem, "blocks": [(r"^block(\d)\.", None), (later, None), (r"^(?:cls_token)", (4,))]}
        blocks = [(r"^block(\d)\.(\d+)", None), (later, (0,)), (r"^cls_token", (4, 0))]
        return {"stem": stem, "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the activations of the blocks in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Returns the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head; 0 classes: no head."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        options = get_device_dtype(self)
        self.head = nn.Linear(self.num_features, num_classes, **options) if num_classes else nn.Identity()
        _init_weights(self.head)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns the maps of stages [N, D, h, w], after the final features unless intermediates_only.

        The class token takes part in the last stage and is left out of its map.

        Args:
            x: images.
            indices: stages; a number: the last n; None: all.
            norm: apply the final norm to the map of the last stage.
            stop_early: stop after the last stage that is asked for.
            output_fmt: "NCHW".
            intermediates_only: return the maps alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt = {output_fmt!r} must be 'NCHW'")
        take, last = feature_take_indices(self.num_stages, indices)
        maps = []
        for i in range(last + 1 if stop_early else self.num_stages):
            tokens, grid_size = self._forward_stage(x, i)
            x = _as_map(tokens, grid_size)
            if i in take:
                maps.append(_as_map(self.norm(tokens), grid_size) if norm and i == NUM_STAGES - 1 else x)
        if intermediates_only:
            return maps
        return (self.norm(tokens) if i == NUM_STAGES - 1 else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last one of `indices`, and the norm and the head if asked for."""
        take, last = feature_take_indices(self.num_stages, indices)
        is_cut = last < self.num_stages - 1
        for i in range(last + 1, self.num_stages):
            for part in ("patch_embed", "pos_embed", "block"):
                delattr(self, f"{part}{i + 1}")
        self.num_stages = last + 1
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        if prune_norm or is_cut:
            self.norm = nn.Identity()
        if is_cut:
            self.cls_token = None
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images to the tokens of the last stage [N, 1 + L, D], class token first, after the final norm."""
        for i in range(self.num_stages - 1):
            x = _as_map(*self._forward_stage(x, i))
        tokens, _ = self._forward_stage(x, self.num_stages - 1)
        return self.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps tokens [N, 1 + L, D] to [N, num_classes], or to the pooled [N, D] with pre_logits."""
        x = self.head_drop(global_pool_nlc(x, self.global_pool, num_prefix_tokens=1))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _checked(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        height, width = to_2tuple(img_size)
        check_input_size(self, (height, width))
        return height, width

    def _input_of(self, i: int) -> tuple[int, int]:
        stride = STRIDES[i - 1] if i else 1
        return self.img_size[0] // stride, self.img_size[1] // stride

    def _patches(self, i: int) -> PatchEmbed:
        return getattr(self, f"patch_embed{i + 1}")

    def _table(self, i: int) -> nn.Parameter:
        return getattr(self, f"pos_embed{i + 1}")

    def _resampled(self, i: int, new: tuple[int, int], old: tuple[int, int]) -> Tensor:
        has_token = int(i == NUM_STAGES - 1)
        return resample_abs_pos_embed(self._table(i), list(new), list(old), num_prefix_tokens=has_token)

    def _forward_stage(self, x: Tensor, i: int) -> tuple[Tensor, tuple[int, int]]:
        """Maps [N, C, H, W] to the tokens of a stage [N, L (+ 1), D] and its grid."""
        patches = self._patches(i)
        x = patches(x)
        grid_size = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        if i == NUM_STAGES - 1 and self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self._resampled(i, grid_size, patches.grid_size)
        for block in getattr(self, f"block{i + 1}"):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, list(grid_size))
            else:
                x = block(x, list(grid_size))
        return x, grid_size


def _as_map(tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Maps [N, (1 +) L, D] to [N, D, h, w], without the class token."""
    num_patches = grid_size[0] * grid_size[1]
    return tokens[:, tokens.shape[1] - num_patches :].transpose(1, 2).unflatten(2, grid_size).contiguous()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({f"pvt_{size}": _cfg() for size in ("tiny", "small", "medium", "large")})


def _create(name: str, pretrained: bool, **options: Any) -> PVT:
    features = {"out_indices": options.pop("out_indices", tuple(range(NUM_STAGES))), "feature_cls": "getter"}
    return build_model_with_cfg(PVT, name, pretrained, feature_cfg=features, **options)


@register_model
def pvt_tiny(pretrained: bool = False, **options: Any) -> PVT:
    """Builds PVT-Tiny."""
    return _create("pvt_tiny", pretrained, **{"depths": (2, 2, 2, 2), **options})


@register_model
def pvt_small(pretrained: bool = False, **options: Any) -> PVT:
    """Builds PVT-Small."""
    return _create("pvt_small", pretrained, **{"depths": (3, 4, 6, 3), **options})


@register_model
def pvt_medium(pretrained: bool = False, **options: Any) -> PVT:
    """Builds PVT-Medium."""
    return _create("pvt_medium", pretrained, **{"depths": (3, 4, 18, 3), **options})


@register_model
def pvt_large(pretrained: bool = False, **options: Any) -> PVT:
    """Builds PVT-Large."""
    return _create("pvt_large", pretrained, **{"depths": (3, 8, 27, 3), **options})
