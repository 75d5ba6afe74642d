"""The shipped recipes of supervised training: their plans against the published cost, their values against the tables."""

from __future__ import annotations

import functools

import pytest

from mae_et.config.files import load_config
from mae_et.config.shipped import shipped_configs
from mae_et.config.supervised import SupervisedConfig
from mae_et.curriculum.cost import ModelCost
from mae_et.curriculum.plan import make_plan
from mae_et.tasks.supervised_model import timm_cost

RECIPES = {name.partition("/")[2]: path for name, path in shipped_configs().items() if name.startswith("supervised/")}
IMAGENET = [name for name in RECIPES if "22k" not in name and "imagenette" not in name]
BASELINE = {
    "curriculum.preset": "constant", "curriculum.equivalent_epochs": "300", "curriculum.warmup_equivalent_epochs": "20",
}  # fmt: skip
# Images per GPU of the released code with 8 GPUs, at the first bandwidth, at 160 px and at 224 px.
PUBLISHED_MICRO_BATCHES = {
    "resnet50": (512, 512, 512), "convnext_tiny": (256, 256, 128), "convnext_base": (128, 128, 64),
    "deit_small": (512, 512, 256), "swin_tiny": (512, 512, 256), "swin_base": (512, 256, 128), "cswin_tiny": (512, 512, 256),
    "cswin_base": (512, 256, 128),
}  # fmt: skip
AREA_ONLY = ModelCost(32, None, lambda size: size[0] * size[1])  # plans without the network


def test_recipes__there_is_one_for_each_published_model() -> None:
    families = {"resnet50": [""], "convnext": ["tiny", "small", "base"], "deit": ["tiny", "small"],
                "pvt": ["tiny", "small", "medium", "large"], "swin": ["tiny", "small", "base"],
                "cswin": ["tiny", "small", "base"], "caformer": ["s18", "s36", "m36"]}  # fmt: skip
    assert set(IMAGENET) == {f"{family}_{size}".rstrip("_") for family, sizes in families.items() for size in sizes}


@pytest.mark.parametrize("name", IMAGENET)
def test_recipe__counted_cost_is_the_published_one(name: str) -> None:
    config = load_config(SupervisedConfig, RECIPES[name])
    plan = make_plan(config, timm_cost(config), 1_281_167, 8)
    assert config.curriculum.published_speedup is not None
    assert 1.49 <= config.curriculum.published_speedup <= 1.56
    assert plan.nominal_speedup_flops == pytest.approx(config.curriculum.published_speedup, rel=0.02)
    assert plan.equivalent_epochs == 200
    assert 315 < plan.real_epochs < 470


@pytest.mark.parametrize("name", RECIPES)
def test_recipe__loads_plans_and_explains_itself(name: str) -> None:
    config = load_config(SupervisedConfig, RECIPES[name])
    plan = make_plan(config, AREA_ONLY, config.data.num_images or 0, 8)
    assert plan.planned_equivalent_epochs == pytest.approx(config.curriculum.equivalent_epochs, rel=1e-2)
    header = RECIPES[name].read_text().split('"""')[1]
    assert all(word in header for word in ("Command:", "Hardware:", "Expected:", "Source:"))
    assert f"supervised {name}" in header or f"configs/supervised/{name}.py" in header


@pytest.mark.parametrize("name", IMAGENET)
def test_recipe__baseline_of_300_epochs_keeps_the_drop_path(name: str) -> None:
    recipe = load_config(SupervisedConfig, RECIPES[name])
    own = BASELINE | ({"model.drop_path_epochs": "300"} if recipe.model.drop_path_rate else {})
    config = load_config(SupervisedConfig, RECIPES[name], own)
    plan = make_plan(config, AREA_ONLY, 1_281_167, 8)
    assert (len(plan.stages), plan.nominal_speedup) == (1, 1.0)
    assert config.scaled_drop_path_rate == pytest.approx(recipe.scaled_drop_path_rate)
    header = RECIPES[name].read_text().split('"""')[1]
    assert all(f"{key}=" in header for key in own)


@pytest.mark.parametrize("name", IMAGENET)
def test_recipe__warm_up_is_20_real_epochs(name: str) -> None:
    """PVT: 5, as in its own code; DeiT: 20% of the compute."""
    plan = make_plan(load_config(SupervisedConfig, RECIPES[name]), AREA_ONLY, 1_281_167, 8)
    if name.startswith("deit"):
        assert plan.warmup_fraction == pytest.approx(0.2, rel=1e-3)
        return
    real = plan.warmup_fraction * 200 * (224 / plan.stages[0].bandwidth) ** 2
    assert real == pytest.approx(5 if name.startswith("pvt") else 20, rel=0.01)
    assert plan.stages[0].lr == pytest.approx(
        {"pvt": 1e-3, "caformer": 8e-3}.get(name.split("_")[0], 8e-3 if name == "cswin_base" else 4e-3)
    )


@pytest.mark.parametrize("name", PUBLISHED_MICRO_BATCHES)
def test_recipe__micro_batches_are_the_published_ones(name: str) -> None:
    plan = make_plan(load_config(SupervisedConfig, RECIPES[name]), AREA_ONLY, 1_281_167, 8)
    found = {stage.bandwidth: stage.micro_batch_size for stage in plan.stages}
    first = plan.stages[0].bandwidth
    assert (found[first], found[160], found[224]) == PUBLISHED_MICRO_BATCHES[name]


@functools.cache
def plan_22k(name: str, epochs: str):  # type: ignore[no-untyped-def]
    config = load_config(SupervisedConfig, RECIPES[name], {"curriculum.equivalent_epochs": epochs})
    return make_plan(config, AREA_ONLY, 14_197_122, 8)


@pytest.mark.parametrize(
    ("name", "epochs", "real"),
    [("convnext_base_22k", "60", 94.6), ("convnext_large_22k", "45", 70.9), ("convnext_base_22k", "30", 47.3),
     ("cswin_base_22k", "60", 136.4), ("cswin_large_22k", "45", 102.3), ("cswin_base_22k", "30", 68.2)],
)  # fmt: skip
def test_recipe_22k__real_epochs_of_each_budget(name: str, epochs: str, real: float) -> None:
    plan = plan_22k(name, epochs)
    assert plan.real_epochs == pytest.approx(real, abs=0.1)
    assert plan.nominal_speedup == pytest.approx(90 / float(epochs))


def test_recipe_22k__early_large_batch_of_cswin() -> None:
    plan = plan_22k("cswin_base_22k", "45")
    assert [(stage.bandwidth, stage.global_batch_size) for stage in plan.stages] == [
        (96, 16384),
        (160, 7680),
        (224, 4096),
    ]
    assert [stage.lr for stage in plan.stages] == pytest.approx([2e-3, 1e-3 * (7680 / 4096) ** 0.5, 1e-3])
    assert {stage.global_batch_size for stage in plan_22k("convnext_base_22k", "60").stages} == {4096}


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("finetune")])
def test_recipe_22k__fine_tuning_at_384_px(name: str) -> None:
    own = {"data.image_size": "384", "data.eval_crop_ratio": "1.0", "batch.micro_batch_size": "16"}
    plan = make_plan(load_config(SupervisedConfig, RECIPES[name], own), AREA_ONLY, 1_281_167, 8)
    (stage,) = plan.stages
    assert (stage.bandwidth, stage.global_batch_size, stage.micro_batch_size) == (384, 512, 16)
    assert stage.lr == pytest.approx(5e-5)
    assert plan.warmup_fraction == 0
