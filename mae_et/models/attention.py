"""The form of attention: fused (scaled_dot_product_attention) or explicit (matrix product, softmax, matrix product)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Tokens. The explicit form keeps all weights, so its memory grows with the square of the length.
MAX_EXPLICIT_LENGTH = 1024


def prefers_explicit(device_type: str, dtype: torch.dtype | None, length: int) -> bool:
    """Returns whether training is faster with the explicit form.

    PyTorch's fused attention is slow on CPUs in bfloat16: the explicit form takes 0.1 of its time at 37 tokens, 0.5 to
    0.65 at 197 and 0.8 at 1025. In float32 the fused form is faster, or as fast.

    Args:
        device_type: "cpu" or "cuda".
        dtype: of autocast; None: float32.
        length: tokens of an image.
    Source: `tools/bench.py sdpa`, benchmarks/sdpa_torch2.11_amd-epyc_1t.json.
    """
    return device_type == "cpu" and dtype == torch.bfloat16 and length <= MAX_EXPLICIT_LENGTH


def set_attention(model: nn.Module, explicit: bool) -> None:
    """Switches all attention layers of a model that know both forms: ours and timm's, by timm's flag `fused_attn`."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = not explicit  # type: ignore[assignment]


def attend(layer: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Computes attention in the form that a layer is set to.

    Args:
        layer: has timm's flag `fused_attn`.
        query: [N, h, Q, d].
        key, value: [N, h, T, d].
    Returns:
        [N, h, Q, d].
    """
    if layer.fused_attn:
        return nn.functional.scaled_dot_product_attention(query, key, value)
    weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return weights.softmax(dim=-1) @ value
