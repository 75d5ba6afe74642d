"""Linear probe: a frozen encoder, a BatchNorm without parameters and a linear layer.

Shapes: n images, L patches, D width.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def pooled(encoder: VisionTransformer, images: Tensor, pool: str) -> Tensor:
    """Returns the normalised cls token or the mean of the normalised patch tokens, [n, D]."""
    tokens = encoder.forward_features(images)
    return tokens[:, 0] if pool == "token" else tokens[:, encoder.num_prefix_tokens :].mean(dim=1)


class LinearProbe(nn.Module):
    """Classifies images with a frozen encoder, a BatchNorm without parameters and a linear layer.

    In training the BatchNorm uses the statistics of the micro batch of one process, as in the released code. So the losses
    depend on the micro batch size and the number of processes, unlike those of fine-tuning.

    Args:
        encoder: returns [n, 1 + L, D].
        num_classes: of the head.
        pool: "token" or "avg".
    Source: MAE (arXiv 2111.06377), linear probing.
    """

    def __init__(self, encoder: VisionTransformer, num_classes: int, pool: str) -> None:
        super().__init__()
        self.encoder, self.pool = encoder.requires_grad_(False), pool
        self.norm = nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6)
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> LinearProbe:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = pooled(self.encoder, images, self.pool)
        return self.head(self.norm(features))
