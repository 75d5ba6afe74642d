"""Attention with folded relative positions against the explicit form, written out as in the definition."""

import pytest
import torch

import downstream.backbones.attention as attention
from downstream.backbones.attention import (
    GridAttention,
    GridBlock,
    fit_table,
    folded_attention,
    merge,
    partition,
    relative_attention,
)


def explicit(q, k, v, by_row, by_column):
    """All L x L logits, one query and one key at a time."""
    num, heads, length, channels = q.shape
    columns = (by_column.shape[0] + 1) // 2
    rows = length // columns
    logits = q @ k.transpose(-2, -1) / channels**0.5
    bias = []
    for x in range(length):
        for y in range(length):
            down, across = x // columns - y // columns, x % columns - y % columns
            bias.append((q[:, :, x] * (by_row[down + rows - 1] + by_column[across + columns - 1])).sum(-1))
    logits = logits + torch.stack(bias, dim=-1).view(num, heads, length, length)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (5, 3), (1, 6)])
def test_relative_attention__value_and_gradients_equal_the_explicit_form(rows, columns):
    torch.manual_seed(0)
    shapes = [(2, 3, rows * columns, 10)] * 3 + [(2 * rows - 1, 10), (2 * columns - 1, 10)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    twins = [value.detach().double().requires_grad_() for value in inputs]
    out, expected = relative_attention(*inputs), explicit(*twins)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert expected.std() > 0.1
    for value, twin in zip(inputs, twins, strict=True):
        assert value.grad.abs().max() > 0.01 or columns * rows == 1 or value.shape[0] == 1
        assert torch.allclose(value.grad.double(), twin.grad, atol=1e-5), tuple(value.shape)


@pytest.mark.parametrize("block", [20, 100, 10**6])
def test_blocks__any_size_gives_the_same(monkeypatch, block):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 12, 8, requires_grad=True) for _ in range(3)]
    tables = [torch.randn(length, 8, requires_grad=True) for length in (7, 5)]
    expected = torch.autograd.grad(relative_attention(*inputs, *tables).sin().sum(), [*inputs, *tables])
    monkeypatch.setattr(attention, "_BLOCK", block)
    found = torch.autograd.grad(relative_attention(*inputs, *tables).sin().sum(), [*inputs, *tables])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_folded_attention__value_and_gradients_equal_the_explicit_form():
    """The path of GPUs: every term a parameter of its own."""
    torch.manual_seed(0)
    shapes = [(2, 3, 20, 10)] * 3 + [(2, 3, 20, 4), (2, 3, 20, 5)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    twins = [value.detach().double().requires_grad_() for value in inputs]
    out = folded_attention(*inputs)
    q, k, v, rows, columns = twins
    logits = q @ k.transpose(-2, -1) / 10**0.5 + rows.repeat_interleave(5, dim=-1) + columns.repeat(1, 1, 1, 4)
    expected = logits.softmax(-1) @ v
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert all(torch.allclose(a.grad.double(), b.grad, atol=1e-5) for a, b in zip(inputs, twins, strict=True))


def test_relative_attention__zero_tables_are_plain_attention():
    q, k, v = torch.randn(3, 2, 4, 30, 16)
    out = relative_attention(q, k, v, torch.zeros(11, 16), torch.zeros(9, 16))
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-6)


def test_fit_table__crops_or_stretches():
    table = torch.arange(-4.0, 5.0)[:, None]  # the offset itself, of 5 tokens
    assert fit_table(table, 5, crop=True) is table
    assert fit_table(table, 3, crop=True)[:, 0].tolist() == [-2, -1, 0, 1, 2]
    stretched = fit_table(table, 9, crop=False)[:, 0]
    assert len(stretched) == 17
    assert stretched[8] == 0
    assert torch.allclose(stretched, -stretched.flip(0))
    assert torch.all(stretched.diff() > 0) or stretched.diff().min() >= 0


@pytest.mark.parametrize(("height", "width"), [(6, 6), (7, 5), (2, 9), (1, 1)])
def test_merge__undoes_partition(height, width):
    x = torch.randn(2, height, width, 3)
    windows, counts = partition(x, min(3, height), min(3, width))
    assert torch.equal(merge(windows, counts, x.shape), x)


def test_grid_attention__windows_do_not_see_each_other():
    torch.manual_seed(0)
    layer = GridAttention(16, 2, window_size=3, table_size=(3, 3))
    torch.nn.init.normal_(layer.rel_pos_h)
    x = torch.randn(1, 6, 6, 16)
    other = x.clone()
    other[:, 3:, :3] += 1
    changed = (layer(x) - layer(other)).abs().amax(-1)[0] > 1e-6
    assert changed[3:, :3].all()
    assert changed.sum() == 9


def test_grid_attention__each_window_equals_attention_of_its_own():
    torch.manual_seed(0)
    layer = GridAttention(16, 2, window_size=4, table_size=(4, 4))
    for table in (layer.rel_pos_h, layer.rel_pos_w):
        torch.nn.init.normal_(table)
    x = torch.randn(1, 8, 4, 16)
    out = layer(x)
    assert torch.allclose(out[:, 4:], layer(x[:, 4:]), atol=1e-6)
    q, k, v = layer.qkv(x[:, :4]).view(1, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = explicit(q, k, v, layer.rel_pos_h, layer.rel_pos_w).transpose(1, 2).reshape(1, 4, 4, 16)
    assert torch.allclose(out[:, :4], layer.proj(expected), atol=1e-5)


def test_grid_attention__an_image_smaller_than_a_window_gets_no_padding():
    torch.manual_seed(0)
    windowed, whole = GridAttention(16, 2, window_size=14, table_size=(14, 14)), GridAttention(16, 2)
    whole.load_state_dict(windowed.state_dict(), strict=False)
    x = torch.randn(2, 5, 3, 16)
    assert torch.allclose(windowed(x), whole(x), atol=1e-6)


def test_grid_block__without_positions_equals_timm():
    from timm.models.vision_transformer import Block

    torch.manual_seed(0)
    ours, theirs = GridBlock(16, 2, 0, (4, 5)), Block(16, 2, qkv_bias=True)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert (set(missing), unexpected) == ({"attn.rel_pos_h", "attn.rel_pos_w"}, [])
    x = torch.randn(2, 20, 16)
    assert torch.allclose(ours(x.view(2, 4, 5, 16)).flatten(1, 2), theirs(x), atol=1e-5)
