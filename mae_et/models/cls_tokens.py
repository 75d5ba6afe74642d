"""ViTs with several cls tokens, whose mean is the feature of an image (Pixio, arXiv 2512.15715).

In the form of mae_et/storage/plain.py they are the rows of `cls_token`. timm's ViT has one cls token; there and in files in
layout "timm" the others are the first of the `reg_tokens`, and the metadata has their number.

Shapes: N images, L patches, D width, M cls tokens, R registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_et.errors import CheckpointError
from mae_et.models.architecture import count_cls_tokens, count_registers


class ManyClsTokens(VisionTransformer):
    """timm's ViT with several cls tokens: all but the first are the first of its `reg_tokens`.

    Args:
        num_cls_tokens: M. The pooling "token" returns their mean.
        reg_tokens: M - 1 + R.
        **options: of timm's class.
    """

    def __init__(self, num_cls_tokens: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_cls_tokens = num_cls_tokens

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        pool_type = self.global_pool if pool_type is None else pool_type
        return cls_feature(self, x) if pool_type == "token" else super().pool(x, pool_type)


def cls_feature(model: nn.Module, tokens: Tensor) -> Tensor:
    """Returns the cls token, or the mean of several.

    Args:
        model: any ViT of timm.
        tokens: [N, M + R + L, D].
    Returns:
        [N, D].
    """
    num_cls_tokens = getattr(model, "num_cls_tokens", 1)
    return tokens[:, 0] if num_cls_tokens == 1 else tokens[:, :num_cls_tokens].mean(dim=1)


def split_cls_tokens(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Moves all cls tokens but the first to the front of the registers, where timm's ViT has a place for them.

    Args:
        state: `cls_token` [1, M, D], `reg_token` [1, R, D] if R > 0.
    Returns:
        `cls_token` [1, 1, D], `reg_token` [1, M - 1 + R, D]. A state with one cls token stays as it is.
    """
    if count_cls_tokens(state) == 1:
        return dict(state)
    cls_tokens = state["cls_token"]
    registers = [cls_tokens[:, 1:], *([state["reg_token"]] if "reg_token" in state else [])]
    return {**state, "cls_token": cls_tokens[:, :1], "reg_token": torch.cat(registers, dim=1)}


def joined_cls_tokens(state: Mapping[str, Tensor], num_cls_tokens: int, where: str) -> dict[str, Tensor]:
    """Reverses `split_cls_tokens`.

    Args:
        state: as from `split_cls_tokens`, or with all cls tokens joined already.
        num_cls_tokens: M.
        where: the file, for the message.
    Raises:
        CheckpointError: if there are fewer tokens.
    """
    if num_cls_tokens == 1 or "cls_token" not in state or count_cls_tokens(state) == num_cls_tokens:
        return dict(state)
    if count_cls_tokens(state) != 1 or count_registers(state) < num_cls_tokens - 1:
        raise CheckpointError(
            f"{where} records num_cls_tokens = {num_cls_tokens}, but has {count_cls_tokens(state)} cls tokens and "
            f"{count_registers(state)} registers: export it again from its checkpoint"
        )
    more, registers = state["reg_token"].split([num_cls_tokens - 1, count_registers(state) - num_cls_tokens + 1], dim=1)
    joined = {**state, "cls_token": torch.cat([state["cls_token"], more], dim=1), "reg_token": registers}
    if not registers.shape[1]:
        del joined["reg_token"]
    return joined
