"""Who decays, and the learning rate of each group."""

import pytest
import torch
from torch import nn

from mae_et.models.mae import MaskedAutoencoder
from mae_et.optim import decays, param_groups, set_lr

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
DECAYED = {
    "cls_token", "mask_token", "patch_embed.proj.weight", "decoder_embed.weight", "decoder_pred.weight",
    *(f"{b}.0.{k}.weight" for b in ("blocks", "decoder_blocks") for k in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blocks.0.attn.qkv.weight", (6, 2), True),
        ("patch_embed.proj.weight", (4, 3, 2, 2), True),
        ("cls_token", (1, 1, 4), True),
        ("norm.weight", (4,), False),
        ("blocks.0.attn.qkv.bias", (6,), False),
        ("odd.bias", (2, 2), False),
        ("scale", (), False),
    ],
)
def test_decays__matrices_and_tokens(name, shape, expected):
    assert decays(name, torch.zeros(shape)) is expected


def test_param_groups__every_parameter_once():
    model = MaskedAutoencoder(**SMALL)
    decayed, plain = param_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    names = [{name for name, _ in group["params"]} for group in (decayed, plain)]
    assert names[0] == DECAYED
    assert names[0] | names[1] == {name for name, _ in model.named_parameters()}
    assert not names[0] & names[1]
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert all(parameter is model.get_parameter(name) for name, parameter in decayed["params"] + plain["params"])


def test_param_groups__leaves_out_frozen_parameters_and_empty_groups():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    (group,) = param_groups(model, 0.1)
    assert group["weight_decay"] == 0
    assert [name for name, _ in group["params"]] == ["0.bias", "1.weight", "1.bias"]


def test_param_groups__a_step_decays_only_what_it_should():
    """With zero gradients, AdamW shrinks the decayed parameters by lr x weight decay and nothing else."""
    model = MaskedAutoencoder(**SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(param_groups(model, 0.5), lr=0.1, fused=True)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, torch.tensor(0.95 if name in DECAYED else 1.0)), name


def test_set_lr__scales_each_group():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr_scale": 0.25}, {"params": [b]}], lr=1.0)
    for lr in (0.4, 0.8):  # absolute: a second call does not build on the first
        set_lr(optimizer, lr)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr / 4, lr])
