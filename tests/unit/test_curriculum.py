"""Presets, integer steps, budgets, batches, learning rates and counted FLOPs.

Numbers of the papers are written out here a second time, from the sources that presets.py names.
"""

import dataclasses
import itertools
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae_et.config.schema import ModelConfig, PretrainConfig, from_dict
from mae_et.curriculum.cost import mae_flops
from mae_et.curriculum.plan import Plan, PlannedStage, schedule
from mae_et.curriculum.presets import PRESETS
from mae_et.errors import ConfigError
from mae_et.models.mae import build_mae
from mae_et.models.sizes import as_size, num_visible_patches
from tests.plans import plan_for

ROOT = Path(__file__).resolve().parents[2]
IMAGENET = 1_281_167


def make_config(**sections):
    return from_dict(PretrainConfig, {"data": {"train": "unused"}, **sections})


def plan_of(preset="etpp", dataset_size=IMAGENET, world_size=1, equivalent_epochs=200, batch=None, **sections):
    curriculum = {"preset": preset, "equivalent_epochs": equivalent_epochs, "warmup_equivalent_epochs": 20}
    curriculum |= sections.pop("curriculum", {})
    return plan_for(make_config(curriculum=curriculum, batch=batch or {}, **sections), dataset_size, world_size)


# ---- presets ----

TENTHS = {
    "etpp": [96] * 2 + [160] * 4 + [224] * 4,
    "etpp_deit": [96] * 2 + [160] * 4 + [192] * 2 + [224] * 2,
    "etpp_convnext": [160] * 6 + [224] * 4,
}


@pytest.mark.parametrize("preset", TENTHS)
def test_presets__ten_equal_tenths_of_the_compute(preset):
    assert [row.bandwidth for row in PRESETS[preset]] == TENTHS[preset]
    assert [row.compute_fraction for row in PRESETS[preset]] == [0.1] * 10
    assert [row.strength for row in PRESETS[preset]] == pytest.approx([m / 9 for m in range(10)])


def test_presets__et_has_five_equal_parts_of_the_epochs():
    assert [row.bandwidth for row in PRESETS["et"]] == [160, 160, 160, 192, 224]
    assert [row.strength for row in PRESETS["et"]] == pytest.approx([m / 9 for m in (1, 3, 5, 7, 9)])
    plan = plan_of("et", equivalent_epochs=300)
    total = plan.real_epochs
    assert [s.bandwidth for s in plan.stages] == [160, 192, 224]
    assert [s.real_epochs / total for s in plan.stages] == pytest.approx([0.6, 0.2, 0.2], abs=1e-3)


def test_presets__blog():
    assert [(row.compute_fraction, row.bandwidth) for row in PRESETS["blog"]] == [(0.4, 96), (0.3, 128), (0.3, 224)]
    assert all(row.strength is None for row in PRESETS["blog"])
    plan = plan_of("blog")
    assert [s.compute_fraction for s in plan.stages] == pytest.approx([0.4, 0.3, 0.3], abs=1e-4)


@pytest.mark.parametrize(("preset", "real_epochs"), [("etpp", 454), ("etpp_deit", 469), ("etpp_convnext", 316)])
def test_make_plan__real_epochs_of_200_equivalent_ones(preset, real_epochs):
    plan = plan_of(preset)
    assert plan.real_epochs == pytest.approx(real_epochs, abs=1)
    exact = sum(20 * (224 / band) ** 2 for band in TENTHS[preset])
    assert plan.real_epochs == pytest.approx(exact, rel=1e-3)
    assert plan.num_images == sum(s.num_steps * s.global_batch_size for s in plan.stages)
    assert plan.real_epochs == plan.num_images / IMAGENET


def test_make_plan__relative_cost_of_et():
    plan = plan_of("et", equivalent_epochs=300)
    assert plan.planned_equivalent_epochs / plan.real_epochs == pytest.approx(0.653, abs=5e-4)


def test_make_plan__constant_is_plain_training():
    plan = plan_of("constant", dataset_size=1000, equivalent_epochs=40, batch={"global_batch_size": 100})
    (stage,) = plan.stages
    assert (stage.bandwidth, stage.num_steps, plan.real_epochs) == (224, 400, 40)
    assert plan.planned_equivalent_epochs == plan.equivalent_epochs_flops == 40
    assert not [note for note in plan.notes if "preset" in note]
    assert plan.nominal_speedup == plan.nominal_speedup_flops == 1600 / 40


# ---- stages ----


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize(("dataset_size", "batch"), [(IMAGENET, 4096), (10_007, 96), (501, 7)])
def test_make_plan__stage_costs_are_as_asked(preset, dataset_size, batch):
    plan = plan_of(preset, dataset_size, batch={"global_batch_size": batch})
    budget = 200 * dataset_size
    rows = PRESETS[preset]
    share = {row.bandwidth: 0.0 for row in rows}
    for row in rows:
        share[row.bandwidth] += row.compute_fraction
    asked = {band: value / sum(share.values()) * budget for band, value in share.items()}

    assert [s.bandwidth for s in plan.stages] == sorted(asked)
    spent = 0.0
    for stage in plan.stages:
        step_cost = batch * (stage.bandwidth / 224) ** 2
        assert abs(stage.num_steps * step_cost - asked[stage.bandwidth]) <= step_cost
        assert stage.equivalent_epochs * dataset_size == pytest.approx(stage.num_steps * step_cost)
        spent += stage.num_steps * step_cost
    assert abs(spent - budget) <= batch  # within one step of the last stage
    assert plan.planned_equivalent_epochs == pytest.approx(spent / dataset_size)
    assert sum(s.compute_fraction for s in plan.stages) == pytest.approx(1)
    assert sum(plan.flops_fraction(s) for s in plan.stages) == pytest.approx(1)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(50, 100_000), st.floats(1, 2000), st.integers(1, 8))
def test_make_plan__budget_adds_up(data, num_stages, dataset_size, epochs, world_size):
    parts = data.draw(st.lists(st.integers(1, 20), min_size=num_stages, max_size=num_stages))
    stages = [
        {
            "compute_fraction": part / sum(parts),
            "bandwidth": 16 * data.draw(st.integers(2, 14)),
            "global_batch_size": world_size * data.draw(st.integers(1, 256)),
        }
        for part in parts
    ]
    curriculum = {"preset": "custom", "stages": stages, "equivalent_epochs": epochs, "warmup_equivalent_epochs": 0}
    micro = data.draw(st.none() | st.integers(1, 300))
    config = make_config(curriculum=curriculum, batch={"micro_batch_size": micro})
    try:
        plan = plan_for(config, dataset_size, world_size)
    except ConfigError as error:
        assume("has room for" not in str(error))  # too little data for a single step of some stage
        raise

    budget = epochs * dataset_size
    merged = [stages[0] | {"compute_fraction": 0.0}]
    for stage in stages:
        if any(stage[key] != merged[-1][key] for key in ("bandwidth", "global_batch_size")):
            merged.append(stage | {"compute_fraction": 0.0})
        merged[-1]["compute_fraction"] += stage["compute_fraction"]
    assert len(plan.stages) == len(merged)

    costs = [m["global_batch_size"] * (m["bandwidth"] / 224) ** 2 for m in merged]
    previous = 0.0
    step = image = 0
    for planned, asked, cost in zip(plan.stages, merged, costs, strict=True):
        off = abs(planned.num_steps * cost - asked["compute_fraction"] * budget)
        assert off <= 0.5 * (cost + previous) + 1e-6 * budget  # its own rounding, and that of the stage before
        assert (planned.first_step, planned.first_image) == (step, image)
        assert planned.num_images == planned.num_steps * planned.global_batch_size
        assert planned.accum_steps * planned.micro_batch_size * world_size == planned.global_batch_size
        if micro is not None:
            assert planned.micro_batch_size <= max(1, micro * (224 / planned.bandwidth) ** 2 * 1.05 + 1e-6)
        else:
            assert planned.accum_steps == 1
        step, image, previous = step + planned.num_steps, image + planned.num_images, cost
    assert (plan.num_steps, plan.num_images) == (step, image)
    spent = sum(s.num_steps * cost for s, cost in zip(plan.stages, costs, strict=True))
    assert abs(spent - budget) <= 0.5 * costs[-1] + 1e-6 * budget
    assert plan.planned_equivalent_epochs == pytest.approx(spent / dataset_size)
    assert plan.compute_fraction(0) == 0
    assert plan.compute_fraction(plan.num_steps) == pytest.approx(1)


def small_plan(**kwargs):
    return plan_of(dataset_size=1000, equivalent_epochs=30, batch={"global_batch_size": 32}, **kwargs)


def test_plan__places_of_steps_and_images():
    plan = small_plan(curriculum={"warmup_equivalent_epochs": 3})
    assert len(plan.stages) == 3
    step = image = 0
    cost = 0.0
    total = sum(s.num_steps * s.bandwidth**2 for s in plan.stages)
    for stage in plan.stages:
        for _ in range(stage.num_steps):
            assert plan.stage_at(step) is stage
            assert plan.first_image(step) == image
            assert plan.compute_fraction(step) == pytest.approx(cost / total, abs=1e-9)
            assert plan.equivalent_epochs_at(step) == pytest.approx(cost / total * plan.planned_equivalent_epochs)
            step, image, cost = step + 1, image + stage.global_batch_size, cost + stage.bandwidth**2
    assert (step, image) == (plan.num_steps, plan.num_images)
    assert plan.first_image(step) == image
    assert plan.compute_fraction(step) == pytest.approx(1)
    assert plan.equivalent_epochs_at(step) == pytest.approx(plan.planned_equivalent_epochs)


# ---- other sizes ----

ETPP_BELOW_160 = {  # image size, patch size: bandwidths in the proportions of 96, 160, 224, on the nearest multiple
    (32, 4): (12, 24, 32),
    (64, 8): (24, 48, 64),
    (64, 16): (32, 48, 64),
    (144, 16): (64, 96, 144),
}


@pytest.mark.parametrize(("size", "patch"), ETPP_BELOW_160)
def test_make_plan__presets_scale_with_a_small_image_size(size, patch):
    plan = plan_of(data={"train": "unused", "image_size": size}, model={"patch_size": patch})
    bands = [s.bandwidth for s in plan.stages]
    assert tuple(bands) == ETPP_BELOW_160[size, patch]
    for band, original in zip(bands[:2], (96, 160), strict=True):  # no note on the last, which is the image size
        scaled = original * size / 224
        assert abs(band - scaled) <= patch / 2
        (note,) = [note for note in plan.notes if f"bandwidth {original} " in note]
        assert f"becomes {band} at image size {size}" in note
        assert ("snapped" in note) == (abs(band - scaled) > 1e-9)
    (rule,) = [note for note in plan.notes if "below 160" in note]
    assert "scaled" in rule
    assert [s.compute_fraction for s in plan.stages] == pytest.approx([0.2, 0.4, 0.4], abs=1e-3)


@pytest.mark.parametrize(
    ("preset", "size", "bands"),
    [
        ("etpp", 384, [96, 240, 384]),
        ("etpp", 512, [96, 304, 512]),
        ("etpp", 448, [96, 272, 448]),
        ("etpp", 160, [96, 128, 160]),
        ("etpp", 176, [96, 144, 176]),  # (96 + 176) / 2 = 136 rounded up
        ("et", 384, [160, 272, 384]),
        ("et", 512, [160, 336, 512]),
        ("etpp_deit", 384, [96, 240, 320, 384]),  # 312 rounded up
        ("etpp_convnext", 384, [160, 384]),
        ("blog", 384, [96, 240, 384]),
        ("blog", 224, [96, 128, 224]),
        ("blog", 160, [96, 128, 160]),
        ("constant", 384, [384]),
    ],
)
def test_make_plan__the_low_size_does_not_grow_with_the_image_size(preset, size, bands):
    """Published: 96 or 160, half way, final size."""
    plan = plan_of(preset, data={"train": "unused", "image_size": size})
    assert [s.bandwidth for s in plan.stages] == bands


@pytest.mark.parametrize("size", [64, 160, 224, 384, 512])
def test_make_plan__et_has_equal_epochs_at_any_size(size):
    plan = plan_of("et", data={"train": "unused", "image_size": size}, equivalent_epochs=300, model={"patch_size": 8})
    parts = [s.real_epochs / plan.real_epochs for s in plan.stages]
    assert parts == pytest.approx([0.6, 0.2, 0.2] if len(parts) == 3 else [1.0], abs=1e-3)


def test_make_plan__says_where_a_preset_saves_nothing():
    plan = plan_of("et", data={"train": "unused", "image_size": 160})
    assert [s.bandwidth for s in plan.stages] == [160]
    assert any("saves no compute" in note for note in plan.notes)


def test_make_plan__no_notes_where_nothing_changes():
    assert plan_of().notes == ()
    assert plan_of(model={"size": "huge", "patch_size": 16}).notes == ()


def test_make_plan__huge_snaps_to_its_patch():
    plan = plan_of(model={"size": "huge"})
    assert [s.bandwidth for s in plan.stages] == [98, 154, 224]
    assert [s.num_patches for s in plan.stages] == [49, 121, 256]
    assert len(plan.notes) == 2
    for note, numbers in zip(plan.notes, [("96", "98"), ("160", "154")], strict=True):
        assert all(number in note for number in (*numbers, "patch size 14"))


def test_make_plan__visible_patches():
    assert [(s.num_visible, s.num_patches) for s in plan_of().stages] == [(9, 36), (25, 100), (49, 196)]


# ---- batches ----


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("micro", [None, 1, 8, 64, 100, 10_000])
def test_make_plan__micro_batches_grow_as_bandwidth_falls(world_size, micro):
    plan = plan_of(world_size=world_size, batch={"global_batch_size": 4096, "micro_batch_size": micro})
    sizes = [s.micro_batch_size for s in plan.stages]
    assert sizes == sorted(sizes, reverse=True)
    local = 4096 // world_size
    for stage in plan.stages:
        assert stage.accum_steps * stage.micro_batch_size * world_size == stage.global_batch_size == 4096
        slack = 1.0 if stage.bandwidth == 224 else 1.05
        room = local if micro is None else micro * (224 / stage.bandwidth) ** 2 * slack
        fitting = [n for n in range(1, local + 1) if local % n == 0 and n <= room]
        assert stage.micro_batch_size == max(fitting)
    if micro == 64:
        assert sizes[0] > sizes[1] > sizes[2] == 64


def test_make_plan__lr_follows_the_stage_batch():
    stages = [
        {"compute_fraction": 0.5, "bandwidth": 96, "global_batch_size": 512},
        {"compute_fraction": 0.5, "bandwidth": 224},
    ]
    plan = plan_of("custom", curriculum={"stages": stages}, batch={"global_batch_size": 128})
    assert [s.global_batch_size for s in plan.stages] == [512, 128]
    assert [s.lr for s in plan.stages] == pytest.approx([1.5e-4 * 2, 1.5e-4 / 2])


# ---- learning rate and strength ----


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("min_lr", [0.0, 1e-6])
def test_plan_lr__one_warm_up_and_one_cosine_over_the_compute(preset, min_lr):
    optimizer = {"base_lr": 1e-3, "min_lr": min_lr}
    plan = plan_of(preset, 2000, equivalent_epochs=40, batch={"global_batch_size": 64}, optimizer=optimizer)
    peak, warm = 1e-3 * 64 / 256, 20 / 40
    total = sum(s.num_steps * s.bandwidth**2 for s in plan.stages)
    cost, rates = 0.0, []
    for stage in plan.stages:
        for _ in range(stage.num_steps):
            t = cost / total
            share = t / warm if t < warm else 0.5 * (1 + math.cos(math.pi * (t - warm) / (1 - warm)))
            rates.append(plan.lr(len(rates)))
            assert rates[-1] == pytest.approx(min_lr + (peak - min_lr) * share, rel=1e-9, abs=1e-12)
            cost += stage.bandwidth**2
    assert rates[0] == min_lr
    assert max(rates) == pytest.approx(peak, rel=1e-2)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    # No step, also none over a boundary of stages, is larger than the steepest slope allows.
    steepest = max(1 / warm, math.pi / 2 / (1 - warm)) * peak * 224**2 / total
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= steepest * 1.001
    assert plan.lr(plan.num_steps) == pytest.approx(min_lr, abs=1e-15)


def test_schedule__without_warm_up():
    assert schedule(0, 0) == 1
    assert schedule(0.5, 0) == pytest.approx(0.5)
    assert schedule(1, 0) == pytest.approx(0)


def test_plan_strength__tenths_from_0_to_1():
    plan = small_plan()
    seen = [plan.strength(step) for step in range(plan.num_steps)]
    assert sorted(set(seen)) == pytest.approx([m / 9 for m in range(10)])
    assert seen == sorted(seen)
    total = sum(s.num_steps * s.bandwidth**2 for s in plan.stages)
    cost = 0.0
    for step, strength in enumerate(seen):
        tenth = 10 * cost / total
        if abs(tenth - round(tenth)) > 1e-6:  # at a boundary itself, rounding decides
            assert strength == pytest.approx(math.floor(tenth) / 9)
        cost += plan.stage_at(step).bandwidth ** 2


def test_plan_strength__full_all_along_without_a_curriculum():
    plan = small_plan(preset="constant")
    assert {plan.strength(step) for step in range(plan.num_steps)} == {1.0}


def test_plan_strength__linear_where_the_rows_leave_it():
    plan = small_plan(preset="blog")
    assert [plan.strength(step) for step in range(plan.num_steps)] == [
        plan.compute_fraction(step) for step in range(plan.num_steps)
    ]


# ---- faults ----


def test_make_plan__all_faults_at_once():
    stages = [
        {"compute_fraction": 0.4, "bandwidth": 96, "global_batch_size": 200_000},
        {"compute_fraction": 0.3, "bandwidth": 160, "global_batch_size": 30},
        {"compute_fraction": 0.3, "bandwidth": 224, "global_batch_size": 50},
    ]
    with pytest.raises(ConfigError) as caught:
        plan_of("custom", 1000, 4, 30, curriculum={"stages": stages})
    assert len(caught.value.faults) == 3
    assert "bandwidth 96 has room for 0.33 steps of 200000 images" in caught.value.faults[0]
    assert "30 does not divide among 4 processes; the nearest that does is 32" in caught.value.faults[1]
    assert "50 does not divide among 4 processes" in caught.value.faults[2]


@pytest.mark.parametrize(("dataset_size", "world_size"), [(0, 1), (-5, 1), (10, 0)])
def test_make_plan__impossible_arguments(dataset_size, world_size):
    with pytest.raises(ConfigError, match="at least 1"):
        plan_of(dataset_size=dataset_size, world_size=world_size)


def test_make_plan__nearest_batch_for_more_processes_than_images():
    with pytest.raises(ConfigError, match="the nearest that does is 8"):
        plan_of(world_size=8, batch={"global_batch_size": 2})


# ---- tools/plan.py ----

PLAN_KEYS = {
    "fresh_epochs", "forward_flops", "full_size_flops",
    "equivalent_epochs", "baseline_equivalent_epochs", "nominal_speedup", "nominal_speedup_flops",
    "planned_equivalent_epochs", "equivalent_epochs_flops", "dataset_size", "world_size", "image_size",
    "num_steps", "num_images", "num_fresh_images", "real_epochs", "train_petaflops", "backward_factor",
    "warmup_fraction", "min_lr", "strengths", "replay_bytes", "local_world_size", "notes", "stages",
}  # fmt: skip
STAGE_KEYS = {
    "index", "bandwidth", "compute_fraction", "num_steps", "first_step", "row_ends", "global_batch_size", "micro_batch_size",
    "accum_steps", "lr", "num_images", "first_image", "real_epochs", "equivalent_epochs", "num_patches", "num_visible",
    "gflops_per_image", "flops_fraction", "num_fresh_images", "replay", "image_size", "dataset_size", "full_size_images",
    "fresh_epochs", "forward_flops", "input_size", "area_fraction",
}  # fmt: skip


def run_plan(*args):
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "plan.py"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        result,
        end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime,
    )  # of CPU, not affected by other processes


def test_plan_tool__json_has_the_documented_keys_and_starts_quickly():
    assert {f.name for f in dataclasses.fields(Plan)} < PLAN_KEYS
    assert {f.name for f in dataclasses.fields(PlannedStage)} < STAGE_KEYS
    runs = [run_plan(ROOT / "configs/pretrain/demo.py", "--json", "--world-size", 2) for _ in range(3)]
    result = runs[0][0]
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert set(plan) == PLAN_KEYS
    assert all(set(stage) == STAGE_KEYS for stage in plan["stages"])
    assert plan["world_size"] == 2
    assert plan["num_steps"] == sum(stage["num_steps"] for stage in plan["stages"])
    assert min(seconds for _, seconds in runs) < 1.5  # without torch


def test_plan_tool__table_and_overrides():
    result, _ = run_plan(
        ROOT / "configs/pretrain/demo.py", "--cfg-options", "curriculum.preset=constant", "model.size=small"
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0][:2] == ["stage", "bandwidth"]
    assert rows[2][:2] == ["1", "112"]
    assert rows[3] == []  # one stage


def test_plan_tool__faults_are_one_message(tmp_path):
    config = tmp_path / "c.py"
    config.write_text('data = dict(train="x")\nbatch = dict(global_batch_size=30)\n')
    result, _ = run_plan(config)
    assert (result.returncode, result.stdout) == (1, "")
    assert "--dataset-size" in result.stderr
    result, _ = run_plan(config, "--dataset-size", 5000, "--world-size", 4)
    assert result.returncode == 2
    assert "does not divide among 4 processes" in result.stderr
    assert "Traceback" not in result.stderr


# ---- FLOPs ----


@pytest.mark.parametrize(
    ("size", "bandwidth", "model_options", "build_options"),
    [
        ("tiny", 96, {}, {}),
        ("tiny", 160, {}, {}),
        ("tiny", 224, {}, {}),
        ("tiny", (96, 128), {}, {}),
        ("tiny", 64, {"patch_size": 8, "in_chans": 1}, {"patch_size": 8, "in_chans": 1}),
        ("tiny", 64, {"mask_ratio": 0.5, "decoder_depth": 1}, {"decoder_depth": 1}),
        ("base", 96, {}, {}),
        ("base", 128, {"patch_size": 32, "mask_ratio": 0.6}, {"patch_size": 32}),
        ("base", 224, {}, {}),
        ("small", 98, {"patch_size": 14}, {"patch_size": 14}),
        ("tiny", 96, {"num_registers": 4}, {"num_registers": 4}),
        ("tiny", 96, {"num_cls_tokens": 3, "num_registers": 2}, {"num_cls_tokens": 3, "num_registers": 2}),
        ("tiny", 96, {"mlp": "swiglu"}, {"mlp": "swiglu", "mlp_ratio": 8 / 3}),
        (
            "tiny",
            96,
            {"mlp_ratio": 2, "rotary_positions": True},
            {"mlp_ratio": 2, "decoder_mlp_ratio": 4.0, "rotary_positions": True},
        ),
        ("tiny", 96, {"target": "hog"}, {"target": "hog"}),
        ("base", 224, {"target": "hog", "hog_cell_size": 4}, {"target": "hog", "hog_cell_size": 4}),
        (
            "small",
            70,
            {"target": "hog", "patch_size": 14, "in_chans": 1},
            {"target": "hog", "patch_size": 14, "in_chans": 1},
        ),
    ],
)
def test_mae_flops__equal_torchs_count(size, bandwidth, model_options, build_options):
    config = ModelConfig(size=size, **model_options)
    model = build_mae(size, img_size=bandwidth, **build_options)
    images = torch.zeros(1, config.in_chans, *as_size(bandwidth))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images, mask_ratio=config.mask_ratio)
    assert mae_flops(config, bandwidth) == counter.get_total_flops()


def test_make_plan__flops_of_the_run():
    plan = small_plan(model={"size": "tiny"})
    flops = [s.num_images * mae_flops(ModelConfig(size="tiny"), s.bandwidth) for s in plan.stages]
    assert plan.train_petaflops == pytest.approx(3 * sum(flops) / 1e15)
    assert [plan.flops_fraction(s) for s in plan.stages] == pytest.approx([f / sum(flops) for f in flops])
    full = mae_flops(ModelConfig(size="tiny"), 224)
    assert plan.equivalent_epochs_flops == pytest.approx(sum(flops) / (1000 * full))
    assert plan.nominal_speedup_flops == pytest.approx(1600 / plan.equivalent_epochs_flops)


@pytest.mark.parametrize(("num_patches", "visible"), [(36, 9), (100, 25), (196, 49), (10, 2), (3, 0)])
def test_num_visible_patches__rounds_down(num_patches, visible):
    assert num_visible_patches(num_patches, 0.75) == visible


# ---- rows of a curriculum ----


@pytest.mark.parametrize("num_images", [997, 9469, 50_000])
@pytest.mark.parametrize("rule", ["none", "area"])
def test_row_ends__depend_on_the_rows_before_alone(num_images, rule):
    """So a branch of a search starts exactly where its trunk ended, with any stages after it."""

    def ends(bandwidths):
        rows = [{"compute_fraction": 0.2, "bandwidth": band} for band in bandwidths]
        batch = {"global_batch_size": 64, "early_large_batch": {"rule": rule}}
        plan = plan_of("custom", num_images, batch=batch, equivalent_epochs=40, curriculum={"stages": rows})
        first_images = [plan.first_image(end) for stage in plan.stages for end in stage.row_ends]
        return [end for stage in plan.stages for end in stage.row_ends], first_images

    for prefix in itertools.product((96, 160, 224), repeat=3):
        before, images = ends([*prefix, 224, 224])
        for candidate in (96, 160, 224):
            after, more = ends([*prefix, candidate, 224])
            assert after[:3] == before[:3]
            assert more[:3] == images[:3]
        assert before == sorted(before)
