"""Who decays, and the learning rate of each group."""

import re

import pytest
import torch
from torch import nn

from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.param_groups import decays, layer_of, param_groups, set_lr
from mae_et.models.vit import random_vit

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


# ---- layer decay ----


def naive_scale_and_decay(name):
    """Of a fine-tuned ViT of 12 blocks: the formula of BEiT and of MAE's fine-tuning, written from the names."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        power = 13
    elif block:
        power = 12 - int(block[1])
    else:
        assert name.startswith(("norm.", "fc_norm.", "head."))
        power = 0
    is_plain = "norm" in name or name.endswith(".bias") or name in ("cls_token", "pos_embed")
    scale = 1.0
    for _ in range(power):
        scale *= 0.65
    return scale, 0.0 if is_plain else 0.05


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_param_groups__layer_decay_of_twelve_blocks(pool):
    model = random_vit(32, patch_size=8, embed_dim=16, depth=12, num_heads=2, num_classes=5, global_pool=pool)
    groups = param_groups(model, 0.05, layer_decay=0.65, depth=12, no_decay=("pos_embed", "cls_token"))
    found = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name, _ in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    for name, _ in model.named_parameters():
        scale, decay = naive_scale_and_decay(name)
        assert found[name] == (pytest.approx(scale, rel=1e-12), decay), name
    assert sorted({group["lr_scale"] for group in groups}) == pytest.approx([0.65**i for i in range(13, -1, -1)])
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    set_lr(optimizer, 2e-3)
    lrs = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
    assert lrs["head.weight"] == 2e-3
    assert lrs["patch_embed.proj.weight"] == pytest.approx(2e-3 * 0.65**13)
    assert lrs["blocks.11.mlp.fc2.bias"] == pytest.approx(2e-3 * 0.65)


def test_param_groups__layer_decay_needs_the_depth():
    with pytest.raises(ValueError, match="needs depth"):
        param_groups(nn.Linear(2, 2), 0.05, layer_decay=0.5)


def test_layer_of__every_kind_of_name():
    assert [layer_of(name, 3) for name in ("cls_token", "mask_token", "pos_embed", "patch_embed.proj.bias")] == [0] * 4
    assert [layer_of(f"blocks.{i}.norm1.weight", 3) for i in range(3)] == [1, 2, 3]
    assert [layer_of(name, 3) for name in ("norm.weight", "fc_norm.bias", "head.weight")] == [4] * 3
