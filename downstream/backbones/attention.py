"""Attention with decomposed relative positions at the memory of plain attention.

Shapes: N images or windows, h heads, gh x gw the grid, L = gh gw tokens, d channels of a head, D = h d.

The logit of query (i, j) and key (a, b) is s q.k + q.Rh[i - a] + q.Rw[j - b]. As a mask the two last terms take N h L L
numbers. Each depends on the key through a or b alone, so they are an inner product too: append q.Rh[i - a] for all a and
q.Rw[j - b] for all b to the query, and the one-hot codes of a and b to the key. Fused attention then computes everything. CPUs
are slow with wider heads, so there the terms are added to one block of the logits at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

_ALIGNMENT = 8  # of a head's channels, for the fused kernels of GPUs
_BLOCK = 2**20  # logits; 4 MB stay in the cache


def relative_attention(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt(d) + relative positions) v.

    Args:
        q, k, v: [N, h, gh gw, d].
        by_row: [2 gh - 1, d], the vectors Rh of the offsets -(gh - 1) .. gh - 1.
        by_column: [2 gw - 1, d], likewise Rw.
    Returns:
        [N, h, gh gw, d].
    Source: ViTDet (arXiv 2203.16527), decomposed relative positions after MViTv2 (arXiv 2112.01526): the terms are not scaled.
    """
    num, heads, length, channels = q.shape
    rows, columns = (by_row.shape[0] + 1) // 2, (by_column.shape[0] + 1) // 2
    assert rows * columns == length, f"tables for {rows} x {columns} tokens, not {length}"
    grid = q.view(num, heads, rows, columns, channels)
    row_terms = torch.einsum("nhijd,iad->nhija", grid, by_row[_offsets(rows, q.device)]).flatten(2, 3)
    column_terms = torch.einsum("nhijd,jbd->nhijb", grid, by_column[_offsets(columns, q.device)]).flatten(2, 3)
    if is_exporting():
        queries, keys, *terms = (part.flatten(0, 1) for part in (q, k, row_terms, column_terms))
        return (_weights(queries, keys, *terms) @ v.flatten(0, 1)).view(num, heads, length, channels)
    if q.device.type == "cpu":
        parts = (part.flatten(0, 1) for part in (q, k, v, row_terms, column_terms))
        return _BlockwiseAttention.apply(*parts).view(num, heads, length, channels)
    return folded_attention(q, k, v, row_terms, column_terms)


def folded_attention(q: Tensor, k: Tensor, v: Tensor, row_terms: Tensor, column_terms: Tensor) -> Tensor:
    """Adds terms of the key's row and column to the logits by widening queries and keys; for fused kernels of GPUs.

    Args:
        q, k, v: [N, h, gh gw, d].
        row_terms: [N, h, gh gw, gh], for each query and row of keys.
        column_terms: [N, h, gh gw, gw], for each query and column of keys.
    Returns:
        [N, h, gh gw, d].
    """
    num, heads, _, channels = q.shape
    rows, columns = row_terms.shape[-1], column_terms.shape[-1]
    padding = -(channels + rows + columns) % _ALIGNMENT
    parts = [part.to(q.dtype) for part in (q * channels**-0.5, row_terms, column_terms)]
    query = F.pad(torch.cat(parts, dim=-1), (0, padding))
    codes = torch.cat(
        [
            torch.eye(rows, dtype=k.dtype, device=k.device).repeat_interleave(columns, dim=0),
            torch.eye(columns, dtype=k.dtype, device=k.device).repeat(rows, 1),
        ],
        dim=1,
    )
    key = torch.cat([k, F.pad(codes, (0, padding)).expand(num, heads, -1, -1)], dim=-1)
    value = F.pad(v, (0, key.shape[-1] - channels))  # fused attention wants equal widths
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :channels]


class _BlockwiseAttention(torch.autograd.Function):
    """Computes the same on CPUs, one block of the logits at a time.

    A block fits the cache. The backward pass computes it again. Inputs: q, k, v [B, L, d], terms [B, L, gh] and [B, L, gw].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row_terms: Tensor, column_terms: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for some, queries in _blocks(*q.shape[:2]):
            weights = _weights(q[some, queries], k[some], row_terms[some, queries], column_terms[some, queries])
            out[some, queries] = weights @ v[some]
        ctx.save_for_backward(q, k, v, row_terms, column_terms, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        q, k, v, row_terms, column_terms, out = ctx.saved_tensors
        grad_q, grad_rows, grad_columns = (torch.empty_like(x) for x in (q, row_terms, column_terms))
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        shift = (grad_out * out).sum(-1, keepdim=True)
        scale = q.shape[-1] ** -0.5
        for some, queries in _blocks(*q.shape[:2]):
            block = (some, queries)
            weights = _weights(q[block], k[some], row_terms[block], column_terms[block])
            grad_v[some] += weights.transpose(1, 2) @ grad_out[block]
            logits = grad_out[block] @ v[some].transpose(1, 2)
            logits.sub_(shift[block]).mul_(weights)  # the gradient of the logits
            grid = logits.view(*logits.shape[:2], row_terms.shape[-1], column_terms.shape[-1])
            grad_rows[block], grad_columns[block] = grid.sum(-1), grid.sum(-2)
            grad_q[block] = (logits @ k[some]).mul_(scale)
            grad_k[some] += (logits.transpose(1, 2) @ q[block]).mul_(scale)
        return grad_q, grad_k, grad_v, grad_rows, grad_columns


def _weights(q: Tensor, k: Tensor, row_terms: Tensor, column_terms: Tensor) -> Tensor:
    """Returns softmax(s q k^T + terms): [b, l, d], [b, L, d], [b, l, gh], [b, l, gw] -> [b, l, L]."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)
    grid = logits.view(*logits.shape[:2], row_terms.shape[-1], column_terms.shape[-1])
    grid += row_terms[..., None]
    grid += column_terms[..., None, :]
    return torch.softmax(logits, dim=-1)


def _blocks(batch: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Cuts [batch, length] queries so that a block has about _BLOCK logits."""
    together = max(1, _BLOCK // length**2)
    queries = length if together > 1 else max(1, _BLOCK // length)
    for first in range(0, batch, together):
        for start in range(0, length, queries):
            yield slice(first, first + together), slice(start, start + queries)


def is_exporting() -> bool:
    """Returns whether torch.export traces the model: loops over blocks and branches on sizes do not fit its graph."""
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


def fit_table(table: Tensor, size: int, *, crop: bool) -> Tensor:
    """Fits the relative positions of an axis to another number of tokens.

    Args:
        table: [2 s - 1, d].
        size: tokens along the axis.
        crop: True takes the middle of the table, so that an offset keeps its meaning in tokens; for windows that a small image
            cuts. False stretches the table; for images of another size than in training.
    Returns:
        [2 size - 1, d].
    """
    length = 2 * size - 1
    if table.shape[0] == length and (crop or not is_exporting()):
        return table
    if crop and length < table.shape[0]:
        start = (table.shape[0] - length) // 2
        return table[start : start + length]
    return F.interpolate(table.float().t()[None], size=length, mode="linear")[0].t().to(table.dtype)


class GridAttention(Attention):
    """Applies timm's attention on a grid, within windows or globally, with optional relative positions.

    Args:
        dim, num_heads: D and h.
        window_size: side of the windows in tokens; 0: global.
        table_size: (gh, gw) tokens of the tables; None: no relative positions.
    """

    def __init__(
        self, dim: int, num_heads: int, window_size: int = 0, table_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(dim, num_heads=num_heads, qkv_bias=True)
        self.window_size = window_size
        if table_size is not None:  # zeros: training starts from the pre-trained function
            self.rel_pos_h: nn.Parameter | None = nn.Parameter(torch.zeros(2 * table_size[0] - 1, dim // num_heads))
            self.rel_pos_w: nn.Parameter | None = nn.Parameter(torch.zeros(2 * table_size[1] - 1, dim // num_heads))
        else:
            self.rel_pos_h = self.rel_pos_w = None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Maps [N, gh, gw, D] to the same shape, for any gh and gw.

        A grid that is not a multiple of the windows is padded with zeros, which the windows at the edge attend to, as in
        ViTDet. Along an axis shorter than a window, the window is shortened.
        """
        num, height, width, dim = x.shape
        if not self.window_size:
            return self._attend(x)
        side = self.window_size  # comparisons, because a traced `min` is not simplified
        rows, columns = side if height >= side else height, side if width >= side else width
        windows, padded = partition(x, rows, columns)
        return merge(self._attend(windows), padded, (num, height, width, dim))

    def _attend(self, x: Tensor) -> Tensor:
        num, rows, columns, dim = x.shape
        qkv = self.qkv(x).view(num, rows * columns, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.rel_pos_h is None or self.rel_pos_w is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            crop = self.window_size > 0
            by_row, by_column = (
                fit_table(self.rel_pos_h, rows, crop=crop),
                fit_table(self.rel_pos_w, columns, crop=crop),
            )
            out = relative_attention(q.contiguous(), k, v, by_row, by_column)
        return self.proj(out.transpose(1, 2).reshape(num, rows, columns, dim))


class GridBlock(Block):
    """Runs timm's transformer block with attention on a grid: [N, gh, gw, D] to the same shape.

    Arguments: those of GridAttention and of timm's Block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 0,
        table_size: tuple[int, int] | None = None,
        **options: object,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=True, **options)  # type: ignore[arg-type]
        self.attn = GridAttention(dim, num_heads, window_size, table_size)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def partition(x: Tensor, rows: int, columns: int) -> tuple[Tensor, tuple[int, int]]:
    """Cuts [N, H, W, D] into windows [N nh nw, rows, columns, D], padded with zeros below and right; also returns (nh, nw)."""
    num, height, width, dim = x.shape
    down, across = (height + rows - 1) // rows, (width + columns - 1) // columns
    x = F.pad(x, (0, 0, 0, across * columns - width, 0, down * rows - height))
    x = x.view(num, down, rows, across, columns, dim).transpose(2, 3)
    return x.reshape(-1, rows, columns, dim), (down, across)


def merge(windows: Tensor, counts: tuple[int, int], shape: tuple[int, int, int, int]) -> Tensor:
    """Merges windows into `shape` [N, H, W, D]; the inverse of `partition`, with the counts that it returned."""
    (down, across), (num, height, width, dim) = counts, shape
    rows, columns = windows.shape[1:3]
    x = windows.view(num, down, across, rows, columns, dim).transpose(2, 3)
    return x.reshape(num, down * rows, across * columns, dim)[:, :height, :width].contiguous()


def _offsets(size: int, device: torch.device) -> Tensor:
    """Returns [size, size]: at query i and key a the row i - a + size - 1 of a table."""
    positions = torch.arange(size, device=device)
    return positions[:, None] - positions[None, :] + size - 1
