"""Fused against explicit attention, forward and backward: the measurement behind `mae_et.models.attention.prefers_explicit`."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from benches.measuring import Comparison, compare, measure
from torch import Tensor

from mae_et.models.attention import attend

# Images, heads, width of a head, tokens: ViT-base's encoder and decoder at 96 and 224 px, unmasked, and larger images.
SHAPES = (
    (32, 12, 64, 10),
    (32, 12, 64, 50),
    (32, 16, 32, 37),
    (32, 16, 32, 197),
    (32, 12, 64, 197),
    (4, 12, 64, 577),
    (2, 12, 64, 1025),
)


def attention_step(fused: bool, inputs: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(attend(SimpleNamespace(fused_attn=fused), *inputs), inputs, grad)


def bench_sdpa(rounds: int) -> list[Comparison]:
    rows = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for n, heads, width, length in SHAPES:
            *inputs, grad = (torch.randn(n, length, heads, width, dtype=dtype).transpose(1, 2) for _ in range(4))
            inputs = [tensor.requires_grad_() for tensor in inputs]
            times = measure(
                {form: partial(attention_step, form == "fused", inputs, grad) for form in ("explicit", "fused")}, rounds
            )
            title = f"{name}, {length} tokens, {n} images, {heads} heads of {width}: explicit against fused"
            rows.append(compare(title, times, "explicit", "fused", None))
    return rows
