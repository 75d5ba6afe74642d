"""Attention with relative positions, forward and backward, against ViTDet's; needs the packages of requirements-mm.txt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from benches.measuring import Comparison, Variants, compare, measure
from benches.memory import compare_memory, peak_of
from torch import Tensor

DIM, NUM_HEADS = 768, 12
# name -> (windows or images, tokens a side, goal of the ratio of times, goal of the ratio of memories)
ATTENTIONS = {
    "global, 64 x 64 tokens": (1, 64, 1 / 1.05, 4.0),
    "global, 32 x 32 tokens": (1, 32, None, None),
    "25 windows of 14 x 14": (25, 14, 1.0, None),
}


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """All logits at once, as in ViTDet. Arguments as `downstream.backbones.attention.relative_attention`."""
    num, heads, length, channels = q.shape
    rows, columns = (by_row.shape[0] + 1) // 2, (by_column.shape[0] + 1) // 2
    logits = (q * channels**-0.5) @ k.transpose(-2, -1)
    down, across = (torch.arange(side)[:, None] - torch.arange(side) + side - 1 for side in (rows, columns))
    grid = q.reshape(num * heads, rows, columns, channels)
    row_terms = torch.einsum("bhwc,hkc->bhwk", grid, by_row[down])
    column_terms = torch.einsum("bhwc,wkc->bhwk", grid, by_column[across])
    logits = logits.view(num * heads, rows, columns, rows, columns)
    logits = (logits + row_terms[..., None] + column_terms[..., None, :]).view(num, heads, length, length)
    return logits.softmax(dim=-1) @ v


def attention_step(name: str, form: str) -> Callable[[], list[Tensor]]:
    """Returns a forward and backward pass that gives the output and all gradients."""
    from downstream.backbones.attention import relative_attention

    num, side, *_ = ATTENTIONS[name]
    torch.manual_seed(0)
    channels = DIM // NUM_HEADS
    inputs = [torch.randn(num, NUM_HEADS, side**2, channels, requires_grad=True) for _ in range(3)]
    inputs += [torch.randn(2 * side - 1, channels).mul_(0.1).requires_grad_() for _ in range(2)]
    grad = torch.randn(num, NUM_HEADS, side**2, channels)
    attend = {"ours": relative_attention, "explicit": explicit_attention}[form]

    def run() -> list[Tensor]:
        out = attend(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    return run


def bench_attention(rounds: int) -> list[Comparison]:
    rows = []
    for name, (_, _, time_goal, memory_goal) in ATTENTIONS.items():
        steps = {form: attention_step(name, form) for form in ("ours", "explicit")}
        error = _largest_difference(*(steps[form]() for form in ("ours", "explicit")))
        variants: Variants = {**steps}
        row = compare(f"{name}, against the explicit form", measure(variants, rounds), "ours", "explicit", time_goal)
        peaks = {form: peak_of(attention_step, name, form) for form in ("ours", "explicit")}
        rows.append({**row, "relative_difference": error, **compare_memory(peaks, "ours", "explicit", memory_goal)})
    return rows


def _largest_difference(ours: list[Tensor], reference: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, reference, strict=True))
