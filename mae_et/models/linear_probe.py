"""Probes of a frozen encoder: a linear layer on one feature, or on patches that a query pools.

Shapes: n images, L patches, D width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_et.models.cls_tokens import cls_feature


def pooled(encoder: VisionTransformer, images: Tensor, pool: str) -> Tensor:
    """Returns the normalised cls token (the mean of several) or the mean of the normalised patch tokens, [n, D]."""
    tokens = encoder.forward_features(images)
    return cls_feature(encoder, tokens) if pool == "token" else tokens[:, encoder.num_prefix_tokens :].mean(dim=1)


class FrozenProbe(nn.Module):
    """A frozen encoder, a BatchNorm without parameters and a linear layer.

    In training the BatchNorm uses the statistics of the micro batch of one process, as in the released code. So the losses
    depend on the micro batch size and the number of processes, unlike those of fine-tuning.

    Args:
        encoder: returns [n, M + R + L, D]: M cls tokens, R registers, the patches.
        num_classes: of the head.
    """

    def __init__(self, encoder: VisionTransformer, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.norm = nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6)
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> FrozenProbe:
        super().train(mode)
        self.encoder.eval()
        return self


class LinearProbe(FrozenProbe):
    """Classifies images by a linear layer on the cls token or on the mean of the patches.

    Args:
        encoder, num_classes: as for FrozenProbe.
        pool: "token" or "avg".
    Source: MAE (arXiv 2111.06377), linear probing.
    """

    def __init__(self, encoder: VisionTransformer, num_classes: int, pool: str) -> None:
        super().__init__(encoder, num_classes)
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = pooled(self.encoder, images, self.pool)
        return self.head(self.norm(features))


class AttentiveProbe(FrozenProbe):
    """Classifies images by a linear layer on the patches that one learnt query pools by cross-attention.

    The BatchNorm normalises the patches, over images and places. The attention has the heads of the encoder.

    Args:
        encoder, num_classes: as for FrozenProbe.
    Source: attentive probing of CAE (arXiv 2202.03026), with the BatchNorm of MAE's linear probe as in AIM (arXiv 2401.08541).
    """

    def __init__(self, encoder: VisionTransformer, num_classes: int) -> None:
        super().__init__(encoder, num_classes)
        width, num_heads = encoder.embed_dim, cast(Any, encoder.blocks[0]).attn.num_heads
        self.query = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            patches = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        patches = self.norm(patches.transpose(1, 2)).transpose(1, 2)
        query = self.query.expand(patches.shape[0], -1, -1)  # len() would fix the batch of an exported graph
        return self.head(self.attention(query, patches, patches, need_weights=False)[0][:, 0])


PROBES = ("linear_probe", "attentive_probe")  # protocols


def make_probe(protocol: str, encoder: VisionTransformer, num_classes: int, pool: str) -> FrozenProbe:
    """Builds the probe of a protocol.

    Args:
        protocol: one of PROBES.
        encoder, num_classes, pool: as for LinearProbe; an attentive probe has no `pool`.
    """
    if protocol == "attentive_probe":
        return AttentiveProbe(encoder, num_classes)
    return LinearProbe(encoder, num_classes, pool)
