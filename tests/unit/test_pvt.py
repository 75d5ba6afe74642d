"""PVT v1 against an implementation patch by patch, its published numbers, and timm's interface."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import group_parameters
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mae_et.errors import UserError
from mae_et.models.pvt import PVT

SMALL: dict[str, Any] = {"depths": (1, 2, 1, 2), "num_classes": 5}
WIDTHS, HEADS, REDUCTIONS = (64, 128, 320, 512), (1, 2, 5, 8), (8, 4, 2, 1)


def small_model(size: int | tuple[int, int] = 64, **options: Any) -> PVT:
    """A PVT whose every parameter matters: norms and biases are random too."""
    torch.manual_seed(0)
    model = PVT(img_size=size, **{**SMALL, **options}).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
        else:
            torch.nn.init.normal_(parameter, 0.0, 2 * parameter[0].numel() ** -0.5)
    return model


def naive_pvt(model: PVT, image: Tensor) -> Tensor:
    """Logits of one image [3, H, W]: each patch and each head on its own."""
    state = {key: value.detach() for key, value in model.state_dict().items()}

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        std = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return centred / std * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def patches(name: str, x: Tensor, side: int) -> Tensor:  # [C, H, W] -> [H / side, W / side, D]
        kernel = state[f"{name}.weight"].flatten(1)
        rows = []
        for top in range(0, x.shape[1], side):
            cells = [x[:, top : top + side, left : left + side].flatten() for left in range(0, x.shape[2], side)]
            rows.append(torch.stack([kernel @ cell + state[f"{name}.bias"] for cell in cells]))
        return torch.stack(rows)

    x = image
    for i, (dim, heads, reduction) in enumerate(zip(WIDTHS, HEADS, REDUCTIONS, strict=True)):
        grid = norm(f"patch_embed{i + 1}.norm", patches(f"patch_embed{i + 1}.proj", x, 2 if i else 4), 1e-5)
        height, width = grid.shape[:2]
        tokens = grid.reshape(-1, dim)
        if i == 3:
            tokens = torch.cat([state["cls_token"][0], tokens])
        tokens = tokens + state[f"pos_embed{i + 1}"][0]
        for j in range(SMALL["depths"][i]):
            name = f"block{i + 1}.{j}"
            y = norm(f"{name}.norm1", tokens, 1e-6)
            q, source = linear(f"{name}.attn.q", y), y
            if reduction > 1:
                reduced = patches(f"{name}.attn.sr", y.T.reshape(dim, height, width), reduction)
                source = norm(f"{name}.attn.norm", reduced.reshape(-1, dim), 1e-5)
            k, v = linear(f"{name}.attn.kv", source).split(dim, dim=-1)
            out = torch.zeros_like(q)
            for head in range(heads):
                part = slice(head * dim // heads, (head + 1) * dim // heads)
                scores = (q[:, part] @ k[:, part].T / (dim // heads) ** 0.5).exp()
                out[:, part] = scores / scores.sum(1, keepdim=True) @ v[:, part]
            tokens = tokens + linear(f"{name}.attn.proj", out)
            hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", tokens, 1e-6))
            tokens = tokens + linear(f"{name}.mlp.fc2", hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))
        x = tokens[-height * width :].T.reshape(dim, height, width)
    return linear("head", norm("norm", tokens[0], 1e-6))


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (64, 96)])
def test_forward__equals_the_naive_implementation(size: tuple[int, int]) -> None:
    model, images = small_model(size), torch.randn(2, 3, *size, dtype=torch.float64)
    expected = torch.stack([naive_pvt(model, image) for image in images])
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-9)
    assert expected.std(0).max() > 1e-3  # the images differ in the output


def test_names__are_those_of_the_published_checkpoints() -> None:
    modules, expected = {"norm", "head"}, {"cls_token"}
    for i, depth in enumerate(SMALL["depths"], start=1):
        expected.add(f"pos_embed{i}")
        modules |= {f"patch_embed{i}.proj", f"patch_embed{i}.norm"}
        parts = ["norm1", "attn.q", "attn.kv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
        parts += ["attn.sr", "attn.norm"] if i < 4 else []
        modules |= {f"block{i}.{block}.{part}" for block in range(depth) for part in parts}
    expected |= {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert set(small_model().state_dict()) == expected


PUBLISHED = {
    "tiny": (12_911_848, 13_038_824, 13_229_288),
    "small": (24_168_424, 24_295_400, 24_485_864),
    "medium": (43_890_664, 44_017_640, 44_208_104),
    "large": (61_051_880, 61_178_856, 61_369_320),
}
GMACS = {"tiny": 1.933, "small": 3.816, "medium": 6.659, "large": 9.814}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops__are_the_published_numbers(name: str) -> None:
    for side, expected in zip((96, 160, 224), PUBLISHED[name], strict=True):
        with torch.device("meta"):
            model = timm.create_model(f"pvt_{name}", img_size=side)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(GMACS[name], rel=2e-3)


def test_set_input_size__equals_a_model_built_with_the_resampled_tables() -> None:
    model, images = small_model(64), torch.randn(2, 3, 128, 96, dtype=torch.float64)
    state = dict(model.state_dict())
    for i, stride in enumerate((4, 8, 16, 32)):
        new, old = [128 // stride, 96 // stride], [64 // stride] * 2
        name = f"pos_embed{i + 1}"
        state[name] = resample_abs_pos_embed(state[name], new, old, num_prefix_tokens=int(i == 3))
    built = PVT(img_size=(128, 96), **SMALL).double().eval()
    built.load_state_dict(state)
    before = dict(model.named_parameters())
    model.set_input_size((128, 96))
    assert torch.equal(model(images), built(images))
    replaced = {name for name, parameter in model.named_parameters() if parameter is not before[name]}
    assert replaced == {f"pos_embed{i}" for i in (1, 2, 3, 4)}


def test_dynamic_img_size__resamples_in_the_forward_pass() -> None:
    images = torch.randn(2, 3, 128, 96, dtype=torch.float64)
    model, resized = small_model(64, dynamic_img_size=True), small_model(64)
    resized.set_input_size((128, 96))
    torch.testing.assert_close(model(images), resized(images), rtol=0, atol=1e-5)  # timm resamples in float32
    with pytest.raises(AssertionError, match="doesn't match model"):
        small_model(64)(images)


@pytest.mark.parametrize(("size", "near"), [(112, "96 and 128"), (16, "32")])
def test_size__not_a_multiple_of_32_is_refused(size: int, near: str) -> None:
    with pytest.raises(
        UserError, match=f"{size} px: the size must be a multiple of 32 px. The nearest sizes are {near}"
    ):
        PVT(img_size=size, **SMALL)
    model = small_model(64)
    with pytest.raises(UserError, match=near):
        model.set_input_size(size)
    assert model.img_size == (64, 64)


def test_features__are_the_maps_of_the_stages() -> None:
    images, model = torch.randn(2, 3, 64, 64, dtype=torch.float64), small_model(64)
    final, own = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    assert [tuple(features.shape[1:]) for features in own] == [(64, 16, 16), (128, 8, 8), (320, 4, 4), (512, 2, 2)]
    net = timm.create_model("pvt_tiny", features_only=True, img_size=64, **SMALL).double().eval()
    net.model.load_state_dict(model.state_dict(), strict=False)
    assert net.feature_info.channels() == [64, 128, 320, 512]
    assert net.feature_info.reduction() == [4, 8, 16, 32]
    assert all(torch.equal(a, b) for a, b in zip(net(images), own, strict=True))
    last = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    assert torch.equal(last[0], final[:, 1:].transpose(1, 2).unflatten(2, (2, 2)))
    assert model.prune_intermediate_layers([2]) == [2]
    assert torch.equal(model.forward_intermediates(images, [2], intermediates_only=True)[0], own[2])
    assert not any(
        name.endswith("4") or name.startswith(("cls", "norm", "head")) for name, _ in model.named_parameters()
    )


def test_grad_checkpointing__leaves_the_gradients_unchanged() -> None:
    images, gradients = torch.randn(2, 3, 64, 64, dtype=torch.float64), []
    for enable in (False, True):
        model = small_model(64)
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_reset_classifier__keeps_the_features() -> None:
    model, images = small_model(64), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    tokens = model.forward_features(images)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(images), tokens[:, 0])
    model.reset_classifier(0, "avg")
    assert torch.equal(model(images), tokens[:, 1:].mean(1))


def test_group_matcher__gives_a_layer_to_each_block() -> None:
    model = small_model(64)
    groups = group_parameters(model, model.group_matcher())
    layers = {name: layer for layer, names in groups.items() for name in names}
    assert set(layers) == {name for name, _ in model.named_parameters()}
    assert len(groups) == 1 + 6 + 1
    for names, layer in (
        (("pos_embed1", "patch_embed1.proj.weight"), 0),
        (("block1.0.attn.q.weight",), 1),
        (("pos_embed2", "patch_embed2.norm.bias", "block2.0.mlp.fc1.bias"), 2),
        (("block2.1.attn.sr.weight",), 3),
        (("pos_embed4", "cls_token", "patch_embed4.proj.weight", "block4.0.norm1.weight"), 5),
        (("block4.1.norm2.bias",), 6),
        (("norm.weight", "head.weight"), 7),
    ):
        assert {layers[name] for name in names} == {layer}
    assert len(group_parameters(model, model.group_matcher(coarse=True))) == 6
    assert model.no_weight_decay() == {"cls_token"}
