"""Fused and explicit attention: the same values, chosen by device, precision and length."""

import pytest
import torch

from mae_et.engine import precision
from mae_et.models.attention import MAX_EXPLICIT_LENGTH, prefers_explicit, set_attention
from mae_et.models.mae import build_mae
from mae_et.models.vit import random_vit

DIMS = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def test_prefers_explicit__for_bf16_on_a_cpu_up_to_a_length():
    assert prefers_explicit("cpu", torch.bfloat16, 197)
    assert not prefers_explicit("cpu", torch.bfloat16, MAX_EXPLICIT_LENGTH + 1)
    assert not prefers_explicit("cpu", None, 197)
    assert not prefers_explicit("cuda", torch.bfloat16, 197)


def test_set_attention__both_forms_have_the_same_loss_and_gradients():
    torch.manual_seed(0)
    model = build_mae(
        "tiny", **DIMS, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2, img_size=32, norm_pix_loss=True
    ).double()
    images, noise = torch.randn(2, 3, 32, 32).double(), torch.rand(2, 16)
    found = []
    for explicit in (False, True):
        set_attention(model, explicit)
        loss, _ = model(images, 0.5, noise)
        names, todo = set(), [loss.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in names:
                names.add(node)
                todo += [parent for parent, _ in node.next_functions]
        kinds = {type(node).__name__ for node in names}
        assert any("ScaledDotProduct" in kind or "Flash" in kind for kind in kinds) != explicit, kinds
        found.append([loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_set_attention__reaches_the_layers_of_timm():
    model = random_vit(32, "tiny", **DIMS)
    set_attention(model, True)
    assert all(block.attn.fused_attn is False for block in model.blocks)


@pytest.mark.parametrize(
    ("avx", "amx", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_choose_precision__asks_the_cpu(monkeypatch, avx, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(precision, "cpu_has_bf16", CPU_HAS_BF16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert precision.choose_precision(torch.device("cpu")) == expected


def test_choose_precision__a_torch_without_these_tests_is_fp32(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    monkeypatch.setattr(precision, "cpu_has_bf16", CPU_HAS_BF16)
    assert precision.choose_precision(torch.device("cpu")) == "fp32"


CPU_HAS_BF16 = precision.cpu_has_bf16  # the real one: tests/conftest.py replaces it when the first test starts
