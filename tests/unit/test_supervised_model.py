"""Supervised models: options, sizes, parameter groups, LAMB, drop path and BatchNorm."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from timm.optim import Lamb
from torch import nn

from mae_et.config.schema import from_dict
from mae_et.config.supervised import OWN_OPTIONS, SupervisedConfig
from mae_et.curriculum.plan import make_plan
from mae_et.errors import ConfigError, UserError
from mae_et.models.param_groups import set_lr
from mae_et.models.resize import change_input_size
from mae_et.models.timm_backbone import create_backbone, forward_flops, meta_backbone
from mae_et.tasks.supervised_model import build_model, build_optimizer, check_batch_norm, timm_cost

SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 4]}
# name -> small options, layers of layer decay (stem, blocks, head), names that are exempt from weight decay
FAMILIES: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "resnet18": ({"layers": [1, 1, 1, 2], "channels": [8, 8, 8, 8]}, 1 + 5 + 1, ()),
    "convnext_atto": ({"dims": [8, 8, 8, 8], "depths": [1, 1, 2, 1]}, 1 + 5 + 1, ()),
    "deit_tiny_patch16_224": ({"embed_dim": 16, "depth": 3, "num_heads": 2}, 1 + 3 + 1, ("cls_token", "pos_embed")),
    "swin_tiny_patch4_window7_224": (SWIN, 1 + 5 + 1, ("relative_position_bias_table",)),
    "cswin_tiny_224": ({**SWIN, "depths": [1, 2, 3, 1], "num_heads": [2, 2, 4, 4]}, 1 + (1 + 1 + 2 + 1) + 1, ()),
    "pvt_tiny": ({"depths": [1, 1, 2, 1]}, 1 + 5 + 1, ("cls_token",)),
}


def config_of(name: str, options: dict[str, Any] | None = None, **overrides: Any) -> SupervisedConfig:
    values: dict[str, Any] = {
        "data": {"train": "scenes:20@64", "image_size": 64},
        "model": {"name": name, "options": options or {}},
        "batch": {"global_batch_size": 4},
    }
    for key, value in overrides.items():
        section, _, last = key.partition("__")
        values.setdefault(section, {})[last] = value
    return from_dict(SupervisedConfig, values)


def groups_by_name(config: SupervisedConfig, model: nn.Module) -> dict[str, dict[str, Any]]:
    optimizer = build_optimizer(config, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[parameter], group) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values()), "each parameter is in one group"
    return dict(found)


# ---- parameter groups ----


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("name", FAMILIES)
def test_build_optimizer__weight_decay_of_each_family(name: str, layer_decay: float) -> None:
    options, _, exempt = FAMILIES[name]
    config = config_of(name, options, optimizer__layer_decay=layer_decay, optimizer__weight_decay=0.07)
    model = build_model(config, 5, 64)
    groups = groups_by_name(config, model)
    for key, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and key.rpartition(".")[2] not in exempt
        assert groups[key]["weight_decay"] == (0.07 if decays else 0.0), key


@pytest.mark.parametrize("name", FAMILIES)
def test_build_optimizer__layer_decay_falls_from_the_head_to_the_stem(name: str) -> None:
    options, num_layers, _ = FAMILIES[name]
    config = config_of(name, options, optimizer__layer_decay=0.5)
    model = build_model(config, 5, 64)
    optimizer = build_optimizer(config, model)
    set_lr(optimizer, 8.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert set(rates) == {8.0 * 0.5**layer for layer in range(num_layers)}
    groups = groups_by_name(config, model)
    first, last = next(iter(model.named_parameters()))[0], list(model.named_parameters())[-1][0]
    assert groups[first]["lr_scale"] == 0.5 ** (num_layers - 1)
    assert groups[last]["lr_scale"] == 1


def test_build_optimizer__cswin_has_the_released_20_groups() -> None:
    config = config_of("cswin_base_224", {"embed_dim": 16}, optimizer__layer_decay=0.9)
    groups = groups_by_name(config, build_model(config, 5, 64))
    expected = {
        "stage1_conv_embed.0.weight": 0, "stage1.0.qkv.weight": 1, "stage1.1.qkv.weight": 1, "merge1.conv.weight": 2,
        "stage2.3.qkv.weight": 3, "merge2.conv.weight": 4, "stage3.0.qkv.weight": 4, "stage3.31.qkv.weight": 19,
        "merge3.conv.weight": 20, "stage4.1.qkv.weight": 20, "norm.weight": 21, "head.weight": 21,
    }  # fmt: skip
    for name, layer in expected.items():
        assert groups[name]["lr_scale"] == pytest.approx(0.9 ** (21 - layer)), name


def test_build_optimizer__no_layers_of_timm_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of("caformer_s18", optimizer__layer_decay=0.5)
    model = build_model(config, 5, 64)
    groups = groups_by_name(config, model)
    assert "no layers for caformer_s18" in caplog.text
    for key, parameter in model.named_parameters():
        assert bool(groups[key]["weight_decay"]) == (parameter.ndim > 1), key


def test_build_optimizer__lamb_step_equals_the_formula() -> None:
    config = config_of(
        "resnet18", FAMILIES["resnet18"][0], optimizer__name="lamb", optimizer__weight_decay=0.1, optimizer__eps=1e-6
    )
    torch.manual_seed(0)
    model = build_model(config, 5, 64)
    optimizer = build_optimizer(config, model)
    assert isinstance(optimizer, Lamb)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = 100 * torch.randn_like(parameter)  # far above a norm of 1: the optimizer itself does not clip
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    set_lr(optimizer, 0.01)
    optimizer.step()
    for name, parameter in model.named_parameters():
        start, gradient = before[name], gradients[name]
        decay = 0.1 if parameter.ndim > 1 else 0.0
        update = (
            gradient / (gradient.abs() + 1e-6) + decay * start
        )  # the first step: both moments are corrected to g, g^2
        trust = start.norm() / update.norm() if decay else torch.tensor(1.0)
        torch.testing.assert_close(parameter.detach(), start - 0.01 * trust * update, atol=1e-6, rtol=1e-5)
    assert optimizer.param_groups[0].get("max_grad_norm") is None


# ---- drop path ----


@pytest.mark.parametrize(("epochs", "budget", "rate"), [(200, 100, 0.1), (200, 300, 0.3), (None, 100, 0.2)])
def test_build_model__drop_path_scales_with_the_budget(epochs: int | None, budget: int, rate: float) -> None:
    config = config_of(
        "convnext_atto", FAMILIES["convnext_atto"][0], model__drop_path_rate=0.2, model__drop_path_epochs=epochs,
        curriculum__equivalent_epochs=budget,
    )  # fmt: skip
    rates = [m.drop_prob for m in build_model(config, 5, 64).modules() if isinstance(m, DropPath)]
    assert max(rates) == pytest.approx(rate)


def test_config__drop_path_must_stay_below_1() -> None:
    with pytest.raises(ConfigError, match=r"becomes 1\.25 at curriculum\.equivalent_epochs = 500"):
        config_of("swin_base_patch4_window7_224", model__drop_path_rate=0.5, model__drop_path_epochs=200,
                  curriculum__equivalent_epochs=500)  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"model\.drop_path_epochs = 200.0 has no effect with model.drop_path_rate = 0"
    ):
        config_of("resnet50", model__drop_path_epochs=200)


# ---- options and sizes ----


@pytest.mark.parametrize("option", sorted(OWN_OPTIONS))
def test_config__options_that_other_keys_set(option: str) -> None:
    with pytest.raises(ConfigError, match=f"model.options has '{option}', which follows from .*: remove it"):
        config_of("resnet18", {option: 1})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet18", {"foo": 1}, "argument 'foo'; remove foo"),
        ("resnet18", {"drop_rat": 0.1}, "'drop_rat'; did you mean drop_rate"),
        ("caformer_s18", {"drop_rat": 0.1}, r"'drop_rat'\]; did you mean drop_rate"),
        ("resnet18", {"layers": 3}, r"'layers': 3.*not iterable; correct the options"),
        ("deit_tiny_patch16_224", {"num_heads": 7}, r"divisible by num_heads; correct the options"),
        ("deit_tiny_patch16_224", {"global_pool": ""}, r"tensor \(1, 17, 1000\) for one image, not one row of logits"),
        ("deit_tiny_patch16_224", {"patch_size": 15}, "cannot take images of 64 px: .* nearest sizes are 60 and 75 px"),
        ("resnet5O", {}, "unknown model 'resnet5O'. Similar names: .*resnet50"),
    ],
)
def test_timm_cost__faulty_options_are_one_line(name: str, options: dict[str, Any], words: str) -> None:
    config = config_of(name, options, curriculum__preset="constant")
    with pytest.raises(UserError, match=words) as caught:
        make_plan(config, timm_cost(config), 100)
    assert "\n" not in str(caught.value)


def test_build_model__model_without_stochastic_depth() -> None:
    config = config_of("vgg11", {}, model__drop_path_rate=0.1)
    with pytest.raises(UserError, match=r"set drop_path_rate=0"):
        build_model(config, 5, 64)


@pytest.mark.parametrize(
    ("name", "size", "near"),
    [
        ("deit_tiny_patch16_224", 100, "96 and 112"),
        ("swin_tiny_patch4_window7_224", 100, "96 and 128"),
        ("cswin_tiny_224", 48, "32 and 64"),
        ("pvt_tiny", 48, "32 and 64"),
    ],
)
def test_timm_cost__size_that_the_model_cannot_take(name: str, size: int, near: str) -> None:
    config = config_of(name, FAMILIES[name][0], data__image_size=size)
    with pytest.raises(UserError, match=f"cannot take images of {size} px: .* nearest sizes are {near} px"):
        timm_cost(config)


def test_plan__bandwidth_that_the_model_cannot_take() -> None:
    stages = [{"compute_fraction": 0.5, "bandwidth": 40}, {"compute_fraction": 0.5, "bandwidth": 64}]
    options = FAMILIES["deit_tiny_patch16_224"][0]
    config = config_of("deit_tiny_patch16_224", options, curriculum__preset="custom", curriculum__stages=stages)
    with pytest.raises(UserError, match=r"cannot take images of 40 px: .* 32 and 48 px"):
        make_plan(config, timm_cost(config), 100)


def test_pvt_v2__is_trained_under_its_own_name() -> None:
    config = config_of("pvt_v2_b0", {"embed_dims": [8, 16, 20, 16], "depths": [1, 1, 1, 1]}, data__image_size=224)
    plan = make_plan(config, timm_cost(config), 1000)
    assert [stage.bandwidth for stage in plan.stages] == [96, 160, 224]
    model = build_model(config, 5, 96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 5)


def test_meta_backbone__counts_as_a_built_model_and_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    options = FAMILIES["swin_tiny_patch4_window7_224"][0]
    with caplog.at_level(logging.INFO):
        network = meta_backbone("deit_tiny_patch16_224", 64, embed_dim=16, depth=1, num_heads=2)
        assert [forward_flops(network, size) for size in (32, 64)] == [
            forward_flops(meta_backbone("deit_tiny_patch16_224", size, embed_dim=16, depth=1, num_heads=2), size)
            for size in (32, 64)
        ]
        swin = meta_backbone("swin_tiny_patch4_window7_224", 64, **options)
        assert forward_flops(swin, 96) == forward_flops(
            meta_backbone("swin_tiny_patch4_window7_224", 96, **options), 96
        )
        assert "Resized position embedding" not in caplog.text
        real = create_backbone("deit_tiny_patch16_224", 64, embed_dim=16, depth=1, num_heads=2)
        assert "Resized position embedding" not in caplog.text
        change_input_size(real, None, None, 32)
    assert "Resized position embedding" in caplog.text, "a real resampling is logged"
    assert not any(parameter.is_meta for parameter in real.parameters())


# ---- BatchNorm ----


def test_check_batch_norm__small_micro_batches(caplog: pytest.LogCaptureFixture) -> None:
    def check(name: str, micro: int) -> None:
        config = config_of(
            name, FAMILIES[name][0], batch__global_batch_size=32, batch__micro_batch_size=micro, curriculum__preset="constant",
            regularization__mixup=0.0, regularization__cutmix=0.0,
        )  # fmt: skip
        check_batch_norm(build_model(config, 5, 64), make_plan(config, timm_cost(config), 1000))

    with pytest.raises(ConfigError, match=r"bandwidth 64 has micro batches of 1 image: raise batch\.micro_batch_size"):
        check("resnet18", 1)
    check("convnext_atto", 1)
    check("resnet18", 16)
    assert not caplog.records
    check("resnet18", 8)
    assert "micro batches of 8 images, so its statistics are noisy" in caplog.text
