"""Images that are not square: the sizes of stages, plans, transforms, position tables, and what is refused."""

from __future__ import annotations

import argparse
import math
import re

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from mae_et.cli import image_size
from mae_et.commands.plan import table
from mae_et.config.overrides import apply_overrides
from mae_et.config.schema import ModelConfig, PretrainConfig, from_dict, to_dict
from mae_et.curriculum.cost import vit_cost
from mae_et.curriculum.plan import make_plan
from mae_et.data.transforms import EvalTransform, TrainTransform, draw_box, sample_rng
from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.models.pos_embed import sincos_grid, sincos_pos_embed
from mae_et.models.position_table import fit_position_embedding
from mae_et.models.resize import change_input_size
from mae_et.models.sizes import area_ratio, recorded_size, size_at
from mae_et.models.timm_backbone import create_backbone, forward_flops, meta_backbone
from mae_et.models.vit import random_vit
from tests.conftest import small_values
from tests.plans import plan_for

ROAD = (360, 480)


def stage(bandwidth):
    return {"bandwidth": bandwidth, "compute_fraction": 1.0}


# ------------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("bandwidth", "full", "multiple", "expected"),
    [
        (100, ROAD, 20, (100, 140)),  # 133.3 px are 6.67 patches
        (220, ROAD, 20, (220, 300)),
        (360, ROAD, 20, ROAD),
        (100, (480, 360), 20, (140, 100)),
        (96, (224, 224), 16, (96, 96)),
        (96, ROAD, 1, (96, 128)),
        (16, (32, 40), 16, (16, 16)),  # 20 px are 1.25 patches
        (16, (32, 48), 16, (16, 32)),  # a tie goes up
    ],
)
def test_size_at__by_hand(bandwidth, full, multiple, expected):
    assert size_at(bandwidth, full, multiple) == expected


def test_area_ratio__squares_as_before():
    """Powers and products differ in the last bit, so a square keeps the power."""
    assert all(area_ratio((b, b), (s, s)) == (b / s) ** 2 for s in range(1, 300) for b in range(1, s))
    assert area_ratio((100, 140), ROAD) == pytest.approx(14000 / (360 * 480))


# ----------------------------------------------------------------------------------------------------------- config


def test_config__a_size_is_an_int_or_two():
    square, road = from_dict(PretrainConfig, small_values()), small_values(data__image_size=[32, 48])
    assert (square.data.image_size, to_dict(square)["data"]["image_size"]) == ((32, 32), 32)
    apply_overrides(PretrainConfig, road, {"data.image_size": "32,40"}, "command line")
    config = from_dict(PretrainConfig, road)
    assert (config.data.image_size, to_dict(config)["data"]["image_size"]) == ((32, 40), [32, 40])
    assert from_dict(PretrainConfig, to_dict(config)) == config
    assert image_size("224") == (224, 224)
    assert image_size("360,480") == ROAD
    for text in ("0", "3,4,5", "x", "360x480"):
        with pytest.raises(argparse.ArgumentTypeError, match="360,480"):
            image_size(text)
    assert recorded_size({"image_size": "[360, 480]"}) == ROAD
    assert recorded_size({}, 224) == (224, 224)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"data__image_size": 0}, "data.image_size = 0 must be an int of 1 or more, or a list of two: height and width"),
        ({"data__image_size": [32, 0]}, "data.image_size[1] = 0 must be >= 1"),
        ({"data__image_size": [32, 32, 3]}, "data.image_size = [32, 32, 3] must have 2 values"),
        ({"data__image_size": [32, 48], "model__patch_size": 16, "curriculum__stages": [stage(48)]},
         "curriculum.stages[0].bandwidth = 48 exceeds 32, the shorter side of data.image_size = 32 x 48"),
        ({"data__image_size": [360, 480], "model__patch_size": 16, "curriculum__stages": [stage(96)]},
         "data.image_size = 360 x 480 is not a multiple of 16, the patch size; the nearest is 352 x 480; to keep the sides, "
         "set model.patch_size to 8 or 10 or 12 or 15 or 20 or 24 or 30"),
    ],
)  # fmt: skip
def test_config__faults(changes, fault):
    with pytest.raises(ConfigError) as error:
        from_dict(PretrainConfig, small_values(**changes))
    assert error.value.faults == [fault]


# ------------------------------------------------------------------------------------------------------------- plan


def road_config(**changes):
    values = small_values(data__image_size=list(ROAD), model__patch_size=20, **changes)
    values["curriculum"] = {"preset": "etpp", "equivalent_epochs": 40.0, "warmup_equivalent_epochs": 1.0}
    return from_dict(PretrainConfig, values)


def test_make_plan__both_sides_in_plan_and_records():
    plan = plan_for(road_config(), 10_000)
    assert [stage.input_size for stage in plan.stages] == [(100, 140), (220, 300), ROAD]
    assert [stage.num_patches for stage in plan.stages] == [5 * 7, 11 * 15, 18 * 24]
    areas = sum(stage.num_images * math.prod(stage.input_size) for stage in plan.stages) / math.prod(ROAD)
    assert plan.planned_equivalent_epochs == pytest.approx(areas / 10_000)
    assert plan.planned_equivalent_epochs == pytest.approx(40, rel=1e-3)
    text = table(plan)
    assert re.search(r"1 +100 x 140 +17/35", text)
    assert "bandwidth 96 of preset 'etpp' becomes 100 x 140 at image size 360 x 480" in text
    stored = plan.to_dict()
    assert stored["image_size"] == [360, 480]
    assert stored["stages"][0]["input_size"] == [100, 140]
    assert plan_for(from_dict(PretrainConfig, small_values()), 100).to_dict()["stages"][0]["input_size"] == 16


def test_make_plan__batches_and_replay_follow_the_area():
    config = road_config(
        batch={"global_batch_size": 64, "micro_batch_size": 8, "early_large_batch": {"rule": "area"}},
        replay={"mode": "mix", "stages": [{"bandwidth": 100, "factor": 2, "size": 4}]},
    )
    first, second, last = plan_for(config, 10_000).stages
    assert (first.global_batch_size, second.global_batch_size, last.global_batch_size) == (784, 160, 64)  # 789, 167
    assert first.micro_batch_size <= 8 * 360 * 480 / (100 * 140) * 1.05
    assert first.replay.buffer_bytes == first.replay.buffer_images * 3 * 100 * 140


def test_vit_cost__flops_are_torchs():
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    model = ModelConfig(size="tiny", patch_size=8, **options)
    network = meta_backbone("vit_tiny_patch16_224", (32, 48), patch_size=8, class_token=True, num_classes=2, **options)
    assert vit_cost(model).forward_flops((32, 48)) + 2 * 32 * 2 == forward_flops(network, (32, 48))
    assert vit_cost(model).num_tokens((32, 48)) == (24, 24)


# ------------------------------------------------------------------------------------------------------- transforms


def test_draw_box__has_the_aspect_of_the_result():
    aspects = []
    for seed in range(60):
        with sample_rng(seed):
            _, _, height, width = draw_box(1000, 1000, 0.2, 480 / 360)
            aspects.append(width / height * 360 / 480)
    assert 0.74 < min(aspects) < 0.85
    assert 1.2 < max(aspects) < 1.345
    assert draw_box(1000, 10, 0.99, 2.0) == (496, 0, 7, 10)  # no crop fits: the widest allowed, 10 px over 3/2


def test_transforms__give_the_size():
    image = Image.effect_noise((96, 64), 90).convert("RGB")
    transform = TrainTransform((32, 48))
    with sample_rng(1):
        full = transform(image, 0.5)
    with sample_rng(1):
        small = transform(image, 0.5, (16, 24))
    assert (full.shape, small.shape) == ((3, 32, 48), (3, 16, 24))
    assert EvalTransform((32, 48))(image).shape == (3, 32, 48)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (2000, 100), (48, 32)])
def test_eval_transform__keeps_the_aspect(size):
    """A ramp keeps one slope on both axes: a step of one px is the same part of the image in x as in y."""
    transform = EvalTransform((36, 48), crop_ratio=1.0)
    height, width = transform._resized_size(size[1], size[0])
    assert height >= 36
    assert width >= 48
    assert min(height - 36, width - 48) == 0
    assert abs(height / size[1] - width / size[0]) * max(size) <= 1 + 1e-6


def test_eval_transform__an_image_of_the_size_is_unchanged():
    image = Image.effect_noise((48, 36), 90)
    assert torch.equal(EvalTransform((36, 48), 1.0)(image), pil_to_tensor(image))


# -------------------------------------------------------------------------------------------------- position tables


@pytest.mark.parametrize("grid", [(18, 24), (24, 18), (1, 5), (4, 4), (2, 8)])
def test_sincos_grid__finds_the_grid(grid):
    for dtype in (torch.float32, torch.bfloat16):
        assert sincos_grid(sincos_pos_embed(16, grid).to(dtype)) == grid
    assert sincos_grid(sincos_pos_embed(16, grid) * 1.1) is None


def test_fit_position_embedding__between_rectangles():
    fixed, learnt = sincos_pos_embed(16, (3, 4)), torch.randn(1, 13, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fit_position_embedding(fixed, (6, 2), 16), sincos_pos_embed(16, (6, 2)))
    wide = fit_position_embedding(learnt, (6, 8), 16, recorded=(3, 4))
    tall = fit_position_embedding(learnt, (6, 8), 16, recorded=(4, 3))
    assert wide.shape == (1, 49, 16)
    assert torch.equal(wide[:, 0], learnt[:, 0])
    assert not torch.allclose(wide, tall)
    assert torch.equal(fit_position_embedding(learnt, (3, 4), 16, recorded=(3, 4)), learnt)
    with pytest.raises(CheckpointError, match="square grid at width 16, and the file does not record its image_size"):
        fit_position_embedding(learnt, (3, 4), 16)


# ----------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("name", "options", "first", "last"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 16, "depth": 1, "num_heads": 1, "patch_size": 8}, (16, 24), (32, 48)),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1,) * 4, "num_heads": (1,) * 4}, (32, 64), (64, 96)),
        ("resnet18", {}, (32, 48), (40, 56)),
    ],
)  # fmt: skip
def test_change_input_size__rectangles(name, options, first, last):
    model = create_backbone(name, first, num_classes=2, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, *first)).sum().backward()
    optimizer.step()
    change_input_size(model, optimizer, None, last)
    logits = model(torch.randn(2, 3, *last))
    logits.sum().backward()
    optimizer.step()
    assert logits.shape == (2, 2)
    assert all(
        state["exp_avg"].shape == parameter.shape and torch.isfinite(parameter).all()
        for parameter, state in optimizer.state.items()
    )


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("mixer_s16_224", (32, 48), "mixer_s16_224 has a fixed input size and no method to change it to 32 x 48 px"),
        ("swin_tiny_patch4_window7_224", (360, 480), "360 x 480 px: its windows .* height 352 and 384 px and width 480 px"),
        ("deit_tiny_patch16_224", (360, 480), "cannot take images of 360 x 480 px: .* height 352 and 368 px and width 480 px"),
    ],
)  # fmt: skip
def test_create_backbone__names_the_model_and_why(name, size, words):
    with pytest.raises(UserError, match=words):
        meta_backbone(name, size)


def test_random_vit__nearest_size():
    with pytest.raises(
        UserError, match="image_size = 360 x 480 is not a multiple of the patch size 16; the nearest is 352 x 480"
    ):
        random_vit(ROAD)


def test_make_plan__squares_of_a_model_that_rounds():
    """A multiple of the model, not of the config, rounds the longer side."""
    config = from_dict(PretrainConfig, small_values(data__image_size=[32, 48]))
    plan = make_plan(config, vit_cost(config.model), 1000)
    assert [stage.input_size for stage in plan.stages] == [(16, 24), (24, 40), (32, 48)]  # 36 px are 4.5 patches
