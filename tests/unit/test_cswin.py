"""CSWin against a loop over windows, its published numbers, and timm's interface."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mae_et.errors import UserError
from mae_et.models.cswin import CSWin

SMALL: dict[str, Any] = {"embed_dim": 8, "depths": (1, 2, 2, 1), "num_heads": (2, 4, 4, 8), "num_classes": 5}
NAMES = ("cswin_tiny_224", "cswin_small_224", "cswin_base_224", "cswin_large_224", "cswin_base_384", "cswin_large_384")


def on_meta(name: str, **options: Any) -> CSWin:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def small_model(size: int | tuple[int, int] = 96, **options: Any) -> CSWin:
    """A CSWin whose every parameter matters: norms and biases are random too."""
    torch.manual_seed(0)
    model = CSWin(img_size=size, **{**SMALL, **options}).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
        else:
            torch.nn.init.normal_(parameter, 0.0, 2 * parameter[0].numel() ** -0.5)
    return model


def windows_of(height: int, width: int, h: int, w: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, height, h):
        for left in range(0, width, w):
            yield slice(top, top + h), slice(left, left + w)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, kernel: Tensor, bias: Tensor) -> Tensor:
    """One window: [h, w, C] each. The position term is a 3 x 3 depthwise filter of v, zero outside the window."""
    h, w, width = q.shape
    out, head_dim = torch.zeros_like(q), width // num_heads
    for head in range(num_heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        keys, values = k[..., part].reshape(-1, head_dim), v[..., part].reshape(-1, head_dim)
        for y in range(h):
            for x in range(w):
                scores = (keys @ q[y, x, part] / head_dim**0.5).exp()
                out[y, x, part] = (scores[:, None] * values).sum(0) / scores.sum()
    for y in range(h):
        for x in range(w):
            out[y, x] += bias
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < h and 0 <= x + dx < w:
                        out[y, x] += kernel[:, 0, dy + 1, dx + 1] * v[y + dy, x + dx]
    return out


def naive_block(x: Tensor, state: dict[str, Tensor], num_heads: int, stripe: tuple[int, int] | None) -> Tensor:
    """One image [H, W, C]; a stripe is (height of horizontal, width of vertical), None the whole map."""
    height, width, dim = x.shape

    def norm(name: str, y: Tensor) -> Tensor:
        centred = y - y.mean(-1, keepdim=True)
        std = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / std * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(name: str, y: Tensor) -> Tensor:
        return y @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    q, k, v = linear("qkv", norm("norm1", x)).split(dim, dim=-1)
    shapes = [(height, width)] if stripe is None else [(height, stripe[1]), (stripe[0], width)]
    out, share = torch.zeros_like(x), dim // len(shapes)
    for i, (h, w) in enumerate(shapes):
        part = slice(i * share, (i + 1) * share)
        # Maps that do not divide are padded with zeros, the smaller half first.
        down, right = -height % h, -width % w
        top, left = down // 2, right // 2
        padded = [F.pad(t[..., part], (0, 0, left, right - left, top, down - top)) for t in (q, k, v)]
        result = torch.zeros_like(padded[0])
        for rows, columns in windows_of(height + down, width + right, h, w):
            result[rows, columns] = naive_attention(
                *(t[rows, columns] for t in padded),
                num_heads // len(shapes),
                state[f"attns.{i}.get_v.weight"],
                state[f"attns.{i}.get_v.bias"],
            )
        out[..., part] = result[top : top + height, left : left + width]
    x = x + linear("proj", out)
    hidden = linear("mlp.fc1", norm("norm2", x))
    return x + linear("mlp.fc2", hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))


def naive_cswin(model: CSWin, image: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits of one image [3, H, W]; the stripes belong to `size`."""
    state = {key: value.detach() for key, value in model.state_dict().items()}

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def conv(name: str, x: Tensor, **options: int) -> Tensor:
        x = x.permute(2, 0, 1)[None]
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)[0].permute(1, 2, 0)

    stripes = ((1, 1), (2, 2), (size[0] // 32, size[1] // 32), None)
    x = norm("stage1_conv_embed.2", conv("stage1_conv_embed.0", image.permute(1, 2, 0), stride=4, padding=2))
    for i, stripe in enumerate(stripes):
        if i:
            x = norm(f"merge{i}.norm", conv(f"merge{i}.conv", x, stride=2, padding=1))
        for block in range(SMALL["depths"][i]):
            prefix = f"stage{i + 1}.{block}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            x = naive_block(x, own, SMALL["num_heads"][i], stripe)
    return norm("norm", x).mean((0, 1)) @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (64, 96)])
def test_forward__equals_a_loop_over_windows(size: tuple[int, int]) -> None:
    model, images = small_model(size), torch.randn(2, 3, *size, dtype=torch.float64)
    expected = torch.stack([naive_cswin(model, image, size) for image in images])
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-9)
    assert expected.std(0).max() > 1e-3  # the images differ in the output


def test_forward__pads_maps_that_do_not_divide_into_stripes() -> None:
    model, image = small_model(96, strict_img_size=False), torch.randn(3, 72, 104, dtype=torch.float64)
    expected = naive_cswin(model, image, (96, 96))
    torch.testing.assert_close(model(image[None])[0], expected, rtol=0, atol=1e-9)


PUBLISHED = {"tiny": 22_320_552, "small": 34_643_304, "base": 77_382_184, "large": 173_262_664}
PUBLISHED_21841 = {"tiny": 33_011_985, "small": 45_334_737, "base": 93_408_913, "large": 197_292_337}


@pytest.mark.parametrize("name", NAMES)
def test_parameters__are_the_published_number(name: str) -> None:
    size = name.split("_")[1]
    assert sum(p.numel() for p in on_meta(name).parameters()) == PUBLISHED[size]
    assert sum(p.numel() for p in on_meta(name, num_classes=21841).parameters()) == PUBLISHED_21841[size]


def test_names__are_those_of_the_published_checkpoints() -> None:
    modules = {"stage1_conv_embed.0", "stage1_conv_embed.2", "norm", "head"}
    for i, (depth, num_branches) in enumerate(zip(SMALL["depths"], (2, 2, 2, 1), strict=True)):
        modules |= {f"merge{i}.conv", f"merge{i}.norm"} if i else set()
        parts = ["norm1", "qkv", "proj", "norm2", "mlp.fc1", "mlp.fc2"]
        parts += [f"attns.{branch}.get_v" for branch in range(num_branches)]
        modules |= {f"stage{i + 1}.{block}.{part}" for block in range(depth) for part in parts}
    expected = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert set(small_model().state_dict()) == expected


GMACS = {
    "tiny": (0.759, 2.148, 4.324),
    "small": (1.192, 3.377, 6.801),
    "base": (2.661, 7.491, 14.96),
    "large": (5.957, 16.69, 33.13),
}


@pytest.mark.parametrize("size", GMACS)
def test_flops__are_those_counted_by_formula(size: str) -> None:
    model = on_meta(f"cswin_{size}_224")
    for side, expected in zip((96, 160, 224), GMACS[size], strict=True):
        model.set_input_size(side)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, side, side, device="meta"))
        assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=2e-3)


def test_set_input_size__equals_a_model_built_at_that_size() -> None:
    model, images = small_model(96), torch.randn(2, 3, 160, 160, dtype=torch.float64)
    built = CSWin(img_size=160, **SMALL).double().eval()
    built.load_state_dict(model.state_dict())
    before = model(F.interpolate(images, size=96))
    model.set_input_size(160)
    assert torch.equal(model(images), built(images))
    model.set_input_size(96)
    assert torch.equal(model(F.interpolate(images, size=96)), before)


@pytest.mark.parametrize(("size", "near"), [(100, "96 and 128"), (16, "32")])
def test_size__not_a_multiple_of_32_is_refused(size: int, near: str) -> None:
    with pytest.raises(
        UserError, match=f"{size} px: the size must be a multiple of 32 px. The nearest sizes are {near}"
    ):
        CSWin(img_size=size, **SMALL)
    model = small_model()
    with pytest.raises(UserError, match=near):
        model.set_input_size(size)
    assert model.img_size == (96, 96)


def test_forward__images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="set_input_size"):
        small_model(96)(torch.zeros(1, 3, 128, 128, dtype=torch.float64))


def test_features__are_the_maps_of_the_stages() -> None:
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = small_model(64)
    net = timm.create_model("cswin_tiny_224", features_only=True, img_size=64, **SMALL).double().eval()
    net.load_state_dict({key: value for key, value in model.state_dict().items() if key in net.state_dict()})
    maps = [features.permute(0, 3, 1, 2) for features in net(images)]
    final, own = model.forward_intermediates(images)
    assert net.feature_info.channels() == [8, 16, 32, 64]
    assert net.feature_info.reduction() == [4, 8, 16, 32]
    for features, other in zip(maps, own, strict=True):
        assert torch.equal(features, other)
    assert torch.equal(final, model.forward_features(images))
    last = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    assert torch.equal(last[0], final.permute(0, 3, 1, 2))
    assert model.prune_intermediate_layers([1]) == [1]
    assert torch.equal(model.forward_intermediates(images, [1], intermediates_only=True)[0], own[1])
    assert not any(name.startswith(("stage3", "merge2", "norm", "head")) for name, _ in model.named_parameters())


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
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    model.reset_classifier(0, "")
    assert model(images).shape == (2, 2, 2, 64)


def released_layer(name: str) -> int:
    """Layers of CSWin-B and L as in the released fine-tuning code, from 0 for the stem to 21 for norm and head."""
    part, *rest = name.split(".")
    if part == "stage1_conv_embed":
        return 0
    if part.startswith("merge"):
        return {"merge1": 2, "merge2": 4, "merge3": 20}[part]
    if part.startswith("stage"):
        return {"stage1": 1, "stage2": 2, "stage3": 4, "stage4": 20}[part] + int(rest[0]) // 2
    return 21


def test_group_matcher__gives_the_released_layers() -> None:
    model = on_meta("cswin_base_224")
    groups = group_parameters(model, model.group_matcher())
    assert {name: layer for layer, names in groups.items() for name in names} == {
        name: released_layer(name) for name, _ in model.named_parameters()
    }
    assert model.no_weight_decay() == set()
    stages = group_parameters(model, model.group_matcher(coarse=True))
    assert [{name.split(".")[0] for name in names} for names in stages.values()] == [
        {"stage1_conv_embed"},
        {"stage1"},
        {"merge1", "stage2"},
        {"merge2", "stage3"},
        {"merge3", "stage4"},
        {"norm", "head"},
    ]


def test_drop_path__rises_linearly() -> None:
    model = CSWin(**SMALL, drop_path_rate=0.5)
    blocks = [block for i in range(4) for block in model._stage(i)]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_import__of_the_package_does_not_register_models() -> None:
    code = "import mae_et.models, mae_et, timm; assert not timm.is_model('cswin_tiny_224') and not timm.is_model('pvt_tiny')"
    subprocess.run([sys.executable, "-c", code], check=True)
