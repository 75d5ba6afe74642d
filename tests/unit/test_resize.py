"""A change of the input size: the model, its optimizer and its average follow by name."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim import Lamb
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mae_et.errors import UserError
from mae_et.models.param_groups import param_groups
from mae_et.models.pos_embed import sincos_pos_embed
from mae_et.models.resize import Grid, change_input_size, resample
from mae_et.models.timm_backbone import create_backbone
from mae_et.models.vit import random_vit

VIT: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
PYRAMID: dict[str, Any] = {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (2, 2, 4, 4)}
# name -> small options, and which parameters depend on the size
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "deit_tiny_patch16_224": (VIT, "pos_embed"),
    "deit_tiny_distilled_patch16_224": (VIT, "pos_embed"),
    "deit3_small_patch16_224": (VIT, "pos_embed"),
    "swin_tiny_patch4_window7_224": (PYRAMID, "relative_position_bias_table"),
    "swinv2_tiny_window8_256": (PYRAMID, "nothing"),
    "cswin_tiny_224": (PYRAMID, "nothing"),
    "pvt_tiny": ({"depths": (1, 1, 1, 1)}, "pos_embed"),
    "beit_base_patch16_224": (VIT, "relative_position_bias_table"),
    "eva02_tiny_patch14_224": ({**VIT, "patch_size": 16}, "pos_embed"),
    "vit_relpos_small_patch16_224": (VIT, "nothing"),
}
WITH_TABLES = ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "pvt_tiny")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "lamb": lambda groups: Lamb(groups, lr=1e-2),
}


def small_model(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    return create_backbone(name, size, num_classes=5, **MODELS[name][0])


def new_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    return OPTIMIZERS[kind](param_groups(model, weight_decay=0.05))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, size: int, seed: int) -> None:
    torch.manual_seed(seed)  # images and drop path
    images = torch.randn(2, 3, size, size).to(next(model.parameters()).dtype)
    model.train()
    out = model(images)
    loss = sum(part.square().mean() for part in (out if isinstance(out, tuple) else (out,)))
    loss.backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def naive_bilinear(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """[h, w, D] -> [H, W, D] with H >= h and W >= w: pixel centres, borders repeated."""
    out = torch.zeros(*size, grid.shape[-1], dtype=torch.float64)
    for y, x in itertools.product(range(size[0]), range(size[1])):
        places = []
        for place, new, old in ((y, size[0], grid.shape[0]), (x, size[1], grid.shape[1])):
            source = min(max((place + 0.5) * old / new - 0.5, 0.0), old - 1.0)
            low = int(source)
            places.append(((low, 1 - (source - low)), (min(low + 1, old - 1), source - low)))
        for (row, a), (column, b) in itertools.product(*places):
            out[y, x] += a * b * grid[row, column].double()
    return out


def naive_moment(name: str, moment: Tensor, old_size: int, new_size: int) -> Tensor:
    """The moment of a table at a larger size, from what is known of these models: not from the code under test."""
    if name.endswith("relative_position_bias_table"):
        old, new = (2 * (side // 32) - 1 for side in (old_size, new_size))
        grid = moment.reshape(old, old, -1)
        return naive_bilinear(grid, (new, new)).reshape(new * new, -1).to(moment.dtype)
    stride = 16 if name == "pos_embed" else (4, 8, 16, 32)[int(name[-1]) - 1]
    old, new = old_size // stride, new_size // stride
    num_tokens = moment.shape[1] - old * old  # cls, distillation
    grid = naive_bilinear(moment[0, num_tokens:].reshape(old, old, -1), (new, new)).reshape(1, new * new, -1)
    return torch.cat([moment[:, :num_tokens], grid.to(moment.dtype)], dim=1)


def is_table(name: str) -> bool:
    return "pos_embed" in name or name.endswith("relative_position_bias_table")


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}


def assert_same(a: Any, b: Any) -> None:
    """Compares tensors in nested dicts and lists to the bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    else:
        assert a == b


@pytest.mark.parametrize("name", MODELS)
def test_change_input_size__equals_a_model_built_at_that_size(name: str) -> None:
    model = small_model(name, 96).eval()
    for size in (160, 224, 96):
        shapes = {key: value.shape for key, value in model.named_parameters()}
        change_input_size(model, None, None, size)
        changed = {key for key, value in model.named_parameters() if value.shape != shapes[key]}
        assert changed == {key for key in shapes if key.rpartition(".")[2].startswith(MODELS[name][1])}
        built = small_model(name, size).eval()
        built.load_state_dict(model.state_dict())
        images = torch.randn(2, 3, size, size)
        assert_same(model(images), built(images))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", WITH_TABLES)
def test_change_input_size__moments_stay_with_their_parameters(name: str, kind: str) -> None:
    model = small_model(name, 96).double()  # so that rounding hides nothing
    optimizer = new_optimizer(kind, model)
    for seed in range(2):
        train_step(model, optimizer, 96, seed)
    before = copy.deepcopy(state_by_name(model, optimizer))
    assert change_input_size(model, optimizer, None, 160)

    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} == own
    assert {id(parameter) for parameter in optimizer.state} == own

    # The reference: a new model and a new optimizer, to which weights and moments are given by name.
    reference = small_model(name, 160).double()
    reference.load_state_dict(model.state_dict())
    other = new_optimizer(kind, reference)
    for key, parameter in reference.named_parameters():
        other.state[parameter] = {
            what: naive_moment(key, value, 96, 160)
            if is_table(key) and isinstance(value, Tensor) and value.ndim > 1
            else copy.deepcopy(value)
            for what, value in before[key].items()
        }
    for group, like in zip(other.param_groups, optimizer.param_groups, strict=True):
        group.update(copy.deepcopy({key: value for key, value in like.items() if key != "params"}))  # LAMB's step count
    num_tables = 0
    for key, state in state_by_name(model, optimizer).items():
        num_tables += is_table(key)
        for what, value in state.items():
            torch.testing.assert_close(value, other.state[reference.get_parameter(key)][what], rtol=1e-9, atol=1e-14)
            assert what != "exp_avg_sq" or value.min() >= 0
    assert num_tables

    untrained = copy.deepcopy(model.state_dict())
    train_step(model, optimizer, 160, 2)
    train_step(reference, other, 160, 2)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[key], rtol=1e-9, atol=1e-9)
        if is_table(key):
            assert not torch.equal(value, untrained[key])  # the new parameter learns


@pytest.mark.parametrize("name", [*WITH_TABLES, "cswin_tiny_224", "resnet18"])
def test_change_input_size__resumes_to_the_bit_on_both_sides_of_a_boundary(name: str) -> None:
    sizes = (96, 96, 160, 160, 224)

    def start() -> tuple[nn.Module, torch.optim.Optimizer, ModelEmaV3]:
        torch.manual_seed(0)
        model = create_backbone(name, 224, num_classes=5, **MODELS.get(name, ({},))[0])
        return model, new_optimizer("adamw", model), ModelEmaV3(model, decay=0.9)

    def train(run: tuple[nn.Module, torch.optim.Optimizer, ModelEmaV3], first: int) -> list[dict[str, Any]]:
        model, optimizer, ema = run
        saved = []
        for step in range(first, len(sizes)):
            change_input_size(model, optimizer, ema, sizes[step])
            train_step(model, optimizer, sizes[step], step)
            ema.update(model)
            state = {"model": model, "optimizer": optimizer, "ema": ema.module}
            saved.append(copy.deepcopy({key: part.state_dict() for key, part in state.items()}))
        return saved

    saved = train(start(), 0)
    for done in range(1, len(sizes)):
        model, optimizer, ema = run = start()
        change_input_size(model, optimizer, ema, sizes[done - 1])
        state = copy.deepcopy(saved[done - 1])
        model.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        assert_same(train(run, done)[-1], saved[-1])


@pytest.mark.parametrize("name", MODELS)
def test_change_input_size__average_follows(name: str) -> None:
    model = small_model(name, 96)
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in ema.module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    average = copy.deepcopy(ema.module)
    change_input_size(model, None, ema, 160)
    change_input_size(average, None, None, 160)
    assert_same(ema.module.state_dict(), average.state_dict())
    images = torch.randn(1, 3, 160, 160)
    assert_same(ema.module(images), average.eval()(images))
    ema.update(model)
    for key, parameter in ema.module.named_parameters():
        torch.testing.assert_close(parameter, (average.get_parameter(key) + model.get_parameter(key)) / 2)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "caformer_s18"])
def test_change_input_size__leaves_models_without_size_dependence_alone(name: str) -> None:
    model = create_backbone(name, 224, num_classes=5)
    model.train()
    model(torch.randn(2, 3, 64, 64))
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    assert not change_input_size(model, None, None, 96)
    assert_same(model.state_dict(), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_change_input_size__returns_whether_tensors_were_replaced() -> None:
    changed = {name: change_input_size(small_model(name, 96), None, None, 160) for name in MODELS}
    assert [name for name, is_changed in changed.items() if not is_changed] == ["cswin_tiny_224"]
    for name in MODELS:
        assert not change_input_size(small_model(name, 96), None, None, 96)


def test_change_input_size__model_for_any_size_stays() -> None:
    model = small_model("deit_tiny_patch16_224", 96)
    dynamic = create_backbone("deit_tiny_patch16_224", 96, num_classes=5, dynamic_img_size=True, **VIT)
    assert change_input_size(model, None, None, 160)
    assert not change_input_size(dynamic, None, None, 160)


def test_change_input_size__fixed_tables_are_computed_again() -> None:
    model = random_vit(224, "tiny", num_classes=5)
    ema = ModelEmaV3(model)
    change_input_size(model, None, ema, 96)
    for net in (model, ema.module):
        assert_same(net.pos_embed.data, sincos_pos_embed(192, (6, 6)))


def test_change_input_size__frozen_table_stays_frozen() -> None:
    for name in WITH_TABLES:
        model = small_model(name, 96)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(not is_table(key))
        optimizer = new_optimizer("adamw", model)
        assert change_input_size(model, optimizer, None, 160)
        assert not any(parameter.requires_grad for key, parameter in model.named_parameters() if is_table(key))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("deit_tiny_patch16_224", 100, r"deit_tiny_patch16_224 cannot take images of 100 px.*patch size.*96 and 112"),
        ("swin_tiny_patch4_window7_224", 112, r"swin_tiny.* 112 px: its windows .*whole numbers.*96 and 128"),
        ("cswin_tiny_224", 112, r"cswin_tiny_224 .* 112 px.*multiple of 32.*96 and 128"),
        ("pvt_tiny", 112, r"pvt_tiny .* 112 px.*multiple of 32.*96 and 128"),
        ("deit_tiny_patch16_224", 0, r"0 px.*16 px"),
    ],
)
def test_change_input_size__size_that_does_not_fit_is_refused(name: str, size: int, message: str) -> None:
    model = small_model(name, 96)
    before = dict(model.named_parameters())
    with pytest.raises(UserError, match=message):
        change_input_size(model, None, None, size)
    assert all(parameter is before[key] for key, parameter in model.named_parameters())
    model(torch.zeros(2, 3, 96, 96))


def test_change_input_size__model_that_cannot_change_is_refused() -> None:
    model = create_backbone("mixer_s32_224", 224, num_classes=5)
    assert not change_input_size(model, None, None, 224)
    with pytest.raises(UserError, match="mixer_s32_224 has a fixed input size and no method to change it to 96 px"):
        change_input_size(model, None, None, 96)


def test_change_input_size__factored_moments_are_refused() -> None:
    model = small_model("swin_tiny_patch4_window7_224", 160)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-3)
    train_step(model, optimizer, 160, 0)
    before = dict(model.named_parameters())
    with pytest.raises(UserError, match=r"Adafactor keeps row_var .* layers.0.blocks.0.attn.relative.*use AdamW"):
        change_input_size(model, optimizer, None, 224)
    assert all(parameter is before[key] for key, parameter in model.named_parameters())


@pytest.mark.parametrize("extra_first", [False, True])
def test_resample__equals_bilinear_interpolation(extra_first: bool) -> None:
    grid, extra = torch.randn(1, 15, 4, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    parts = [extra, grid] if extra_first else [grid, extra]
    out = resample(torch.cat(parts, dim=1), Grid((3, 5), extra_first), Grid((7, 6), extra_first))
    first, last = out.split([2, 42] if extra_first else [42, 2], dim=1)
    got, kept = (last, first) if extra_first else (first, last)
    assert_same(kept, extra)
    torch.testing.assert_close(got.reshape(7, 6, 4), naive_bilinear(grid.reshape(3, 5, 4), (7, 6)))


def test_resample__keeps_constants_and_signs_in_both_directions() -> None:
    for old, new in (((3, 3), (13, 13)), ((13, 13), (3, 3))):
        spikes = torch.zeros(old[0] * old[1], 2)
        spikes[:: old[1] + 1] = 1e-6
        out = resample(spikes, Grid(old, False), Grid(new, False))
        assert out.min() >= 0
        assert out.max() > 0
        ones = resample(torch.ones_like(spikes), Grid(old, False), Grid(new, False))
        torch.testing.assert_close(ones, torch.ones(new[0] * new[1], 2))


def test_create_backbone__windows_follow_the_size() -> None:
    for options, size, window in (({}, 96, 3), ({}, 384, 12), ({"patch_size": 2}, 112, 7)):
        model: Any = create_backbone("swin_tiny_patch4_window7_224", size, **PYRAMID, **options)
        assert {block.attn.window_size for stage in model.layers for block in stage.blocks} == {(window, window)}


def test_create_backbone__tables_start_with_their_own_spread() -> None:
    for name in ("deit_tiny_patch16_224", "pvt_tiny"):
        model = create_backbone(name, 96)
        for key, parameter in model.named_parameters():
            if is_table(key):
                assert parameter.std().item() == pytest.approx(0.02, rel=0.1)


def test_create_backbone__unknown_name_lists_near_ones() -> None:
    with pytest.raises(UserError, match=r"unknown model 'cswin_tiny'. Similar names: cswin_tiny_224"):
        create_backbone("cswin_tiny", 224)
