"""CSWin Transformer: attention in horizontal and vertical stripes. Importing this file registers the models with timm.

Parameter names are those of the published checkpoints.

Shapes: N images, H x W map, C channels, M windows of h x w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    Mlp,
    calculate_drop_path_rates,
    create_classifier,
    get_device_dtype,
    to_2tuple,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from mae_et.models.resize import check_input_size

__all__ = ["CSWin"]  # register_model adds the functions
NUM_STAGES = 4
BLOCKS_PER_LAYER = 2


class StripeAttention(nn.Module):
    """Attention within windows, plus a depthwise convolution of the values (LePE).

    Args:
        dim: C.
        num_heads: of C / num_heads channels each.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, qkv: Tensor, window: tuple[int, int]) -> Tensor:
        """Maps [N, H, W, 3 C], in the order q, k, v, to [N, H, W, C].

        A map that does not divide into windows is padded with zeros, half before and half after, as published for
        dense prediction. The convolution pads each window on its own.
        """
        height, width = qkv.shape[1:3]
        down, right = -height % window[0], -width % window[1]
        top, left = down // 2, right // 2
        if down or right:
            qkv = F.pad(qkv, (0, 0, left, right - left, top, down - top))
        windows = window_partition(qkv, window)  # [M, h, w, 3 C]
        values = windows.chunk(3, dim=-1)[2].permute(0, 3, 1, 2)
        position = self.get_v(values).flatten(2).transpose(1, 2)  # [M, h w, C]
        heads = windows.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)  # [M, heads, h w, C / heads]
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) + position
        out = window_reverse(out.unflatten(1, window), window, height + down, width + right)
        return out[:, top : top + height, left : left + width]


class CSWinBlock(nn.Module):
    """Attends in stripes, then applies an MLP; both with a norm before and a residual.

    Half of the heads attend in vertical stripes, the other half in horizontal ones. Without stripes all heads attend over the
    whole map.

    Args:
        dim: C.
        num_heads: even if the block has stripes.
        has_stripes: False in the last stage.
        drop_path: rate of both residual branches.
    """

    def __init__(self, dim: int, num_heads: int, has_stripes: bool, drop_path: float = 0.0) -> None:
        super().__init__()
        self.stripe: tuple[int, int] | None = (
            None  # height of horizontal and width of vertical stripes; None: whole map
        )
        num_branches = 2 if has_stripes else 1
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attns = nn.ModuleList(
            StripeAttention(dim // num_branches, num_heads // num_branches) for _ in range(num_branches)
        )
        self.proj = nn.Linear(dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, H, W, C] to the same shape."""
        height, width = x.shape[1:3]
        if self.stripe is None:
            windows = [(height, width)]
        else:
            windows = [(height, self.stripe[1]), (self.stripe[0], width)]
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, len(windows), -1))
        branches = [branch.flatten(-2) for branch in qkv.unbind(-2)]
        out = [attend(qkv, window) for attend, qkv, window in zip(self.attns, branches, windows, strict=True)]
        x = x + self.drop_path(self.proj(torch.cat(out, dim=-1)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stem(nn.Sequential):
    """Maps images [N, in_chans, S, S] to [N, S/4, S/4, C].

    Args:
        in_chans: channels of the images.
        dim: C.
        strict_img_size: refuse images of another size than `img_size`.
    """

    def __init__(self, in_chans: int, dim: int, strict_img_size: bool) -> None:
        super().__init__(nn.Conv2d(in_chans, dim, 7, stride=4, padding=2), ChannelsLast(), nn.LayerNorm(dim))
        self.strict_img_size = strict_img_size
        self.img_size = (0, 0)  # set by the model

    def forward(self, images: Tensor) -> Tensor:
        if self.strict_img_size and images.shape[-2:] != self.img_size:
            raise ValueError(
                f"images of {tuple(images.shape[-2:])} px do not fit a CSWin for {self.img_size} px: call set_input_size, "
                "or build the model with strict_img_size=False to pad its maps"
            )
        return super().forward(images)


class ChannelsLast(nn.Module):
    """Maps [N, C, H, W] to [N, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class Merge(nn.Module):
    """Halves the sides of a map [N, H, W, C] and doubles its channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class CSWin(nn.Module):
    """CSWin Transformer with timm's interface. No parameter depends on the input size; the stripes of stage 3 do.

    Args:
        img_size: side of the images in px, or (height, width); multiples of 32.
        in_chans: channels of the images.
        num_classes: of the head; 0: no head.
        global_pool: timm's name of the pooling before the head; "": none.
        embed_dim: C of stage 1; doubles from stage to stage.
        depths: number of blocks of each stage.
        num_heads: of each stage.
        drop_rate: dropout before the head.
        drop_path_rate: of the last block; the rate rises linearly from 0.
        strict_img_size: refuse images of another size; False: maps are padded to a multiple of the stripes.
    Raises:
        UserError: if img_size is not a multiple of 32.
    Source: CSWin Transformer (arXiv 2107.00652); stripes of 1, 2, B/32 and the whole map as in EfficientTrain++
        (arXiv 2405.08768), which at B = 224 are the published ones.
    """

    size_multiple = 32
    img_size: tuple[int, int]
    output_fmt = "NHWC"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 2, 21, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        strict_img_size: bool = True,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.feature_info: list[dict[str, Any]] = []
        self.stage1_conv_embed = Stem(in_chans, embed_dim, strict_img_size)
        for i in range(NUM_STAGES):
            dim = embed_dim * 2**i
            if i:
                setattr(self, f"merge{i}", Merge(dim // 2))
            blocks = [CSWinBlock(dim, num_heads[i], i < NUM_STAGES - 1, rate) for rate in rates[i]]
            setattr(self, f"stage{i + 1}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stage{i + 1}"})
        self.num_features = self.head_hidden_size = dim
        self.norm: nn.Module = nn.LayerNorm(dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool, self.head = create_classifier(dim, num_classes, global_pool, input_fmt=self.output_fmt)
        self.num_stages, self.grad_checkpointing = NUM_STAGES, False
        self.apply(_init_weights)
        self.set_input_size(img_size)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Sets the size of the images in px, and with it the stripes.

        Raises:
            UserError: if it is not a multiple of 32.
        """
        height, width = to_2tuple(img_size)
        check_input_size(self, (height, width))
        self.img_size = (height, width)
        self.stage1_conv_embed.img_size = self.img_size
        for i, stripe in enumerate(((1, 1), (2, 2), (height // 32, width // 32))[: self.num_stages]):
            blocks: Any = self._stage(i)
            for block in blocks:
                block.stripe = stripe
        update_model_input_size(self, self.img_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns no name: biases and norms are 1-D and so exempt, and the convolutions decay as published."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns the layers for layer decay: two blocks are a layer, and a merge belongs to the first layer after it.

        Source: released fine-tuning code of EfficientTrain++.
        """
        if coarse:
            stages = [(rf"^(?:merge{i}|stage{i + 1})\.", (i,)) for i in range(self.num_stages)]
            return {"stem": r"^stage1_conv_embed", "blocks": stages}
        layers: list[tuple[str, tuple[int]]] = []
        for i in range(self.num_stages):
            first = len({layer for _, layer in layers})
            if i:
                layers.append((rf"^merge{i}\.", (first,)))
            layers += [
                (rf"^stage{i + 1}\.{block}\.", (first + block // BLOCKS_PER_LAYER,))
                for block in range(len(self._stage(i)))
            ]
        return {"stem": r"^stage1_conv_embed", "blocks": layers}

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
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, pool, input_fmt=self.output_fmt, **get_device_dtype(self)
        )
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
        """Returns the maps of stages [N, C, H, W], after the final features [N, H, W, C] unless intermediates_only.

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
        x = self.stage1_conv_embed(x)
        for i in range(last + 1 if stop_early else self.num_stages):
            x = self._forward_stage(x, i)
            if i in take:
                features = self.norm(x) if norm and i == NUM_STAGES - 1 else x
                maps.append(features.permute(0, 3, 1, 2).contiguous())
        if intermediates_only:
            return maps
        return (self.norm(x) if i == NUM_STAGES - 1 else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last one of `indices`, and the norm and the head if asked for."""
        take, last = feature_take_indices(self.num_stages, indices)
        is_cut = last < self.num_stages - 1
        for i in range(last + 1, self.num_stages):
            delattr(self, f"stage{i + 1}")
            delattr(self, f"merge{i}")
        self.num_stages = last + 1
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        if prune_norm or is_cut:
            self.norm = nn.Identity()
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images to [N, H/32, W/32, C], after the final norm."""
        x = self.stage1_conv_embed(x)
        for i in range(self.num_stages):
            x = self._forward_stage(x, i)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps features [N, H, W, C] to [N, num_classes], or to the pooled [N, C] with pre_logits."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _stage(self, i: int) -> nn.Sequential:
        return getattr(self, f"stage{i + 1}")

    def _forward_stage(self, x: Tensor, i: int) -> Tensor:
        if i:
            x = getattr(self, f"merge{i}")(x)
        stage = self._stage(i)
        return checkpoint_seq(stage, x) if self.grad_checkpointing and not torch.jit.is_scripting() else stage(x)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _cfg(size: int = 224) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "fixed_input_size": True,
        "crop_pct": 0.9 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stage1_conv_embed.0",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs(
    {
        "cswin_tiny_224": _cfg(),
        "cswin_small_224": _cfg(),
        "cswin_base_224": _cfg(),
        "cswin_large_224": _cfg(),
        "cswin_base_384": _cfg(384),
        "cswin_large_384": _cfg(384),
    }
)


def _create(name: str, pretrained: bool, **options: Any) -> CSWin:
    out_indices = options.pop("out_indices", tuple(range(NUM_STAGES)))
    return build_model_with_cfg(CSWin, name, pretrained, feature_cfg={"out_indices": out_indices}, **options)


TINY: dict[str, Any] = {"embed_dim": 64, "depths": (1, 2, 21, 1), "num_heads": (2, 4, 8, 16)}
SMALL: dict[str, Any] = {"embed_dim": 64, "depths": (2, 4, 32, 2), "num_heads": (2, 4, 8, 16)}
BASE: dict[str, Any] = {"embed_dim": 96, "depths": (2, 4, 32, 2), "num_heads": (4, 8, 16, 32)}
LARGE: dict[str, Any] = {"embed_dim": 144, "depths": (2, 4, 32, 2), "num_heads": (6, 12, 24, 24)}


@register_model
def cswin_tiny_224(pretrained: bool = False, **options: Any) -> CSWin:
    """Builds CSWin-T for images of 224 px."""
    return _create("cswin_tiny_224", pretrained, **{**TINY, **options})


@register_model
def cswin_small_224(pretrained: bool = False, **options: Any) -> CSWin:
    """Builds CSWin-S for images of 224 px."""
    return _create("cswin_small_224", pretrained, **{**SMALL, **options})


@register_model
def cswin_base_224(pretrained: bool = False, **options: Any) -> CSWin:
    """Builds CSWin-B for images of 224 px."""
    return _create("cswin_base_224", pretrained, **{**BASE, **options})


@register_model
def cswin_large_224(pretrained: bool = False, **options: Any) -> CSWin:
    """Builds CSWin-L for images of 224 px."""
    return _create("cswin_large_224", pretrained, **{**LARGE, **options})


@register_model
def cswin_base_384(pretrained: bool = False, **options: Any) -> CSWin:
    """Builds CSWin-B for images of 384 px."""
    return _create("cswin_base_384", pretrained, **{"img_size": 384, **BASE, **options})


@register_model
def cswin_large_384(pretrained: bool = False, **options: Any) -> CSWin:
    """Builds CSWin-L for images of 384 px."""
    return _create("cswin_large_384", pretrained, **{"img_size": 384, **LARGE, **options})
