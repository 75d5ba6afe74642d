"""Early Large Batch in the plan: rule and list, their learning rates, budgets that stay exact, micro batches by stage."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mae_et.curriculum.batch import area_batch
from mae_et.errors import ConfigError
from tests.plans import plan_for
from tests.unit.test_config import FULL, faults_of, with_value
from tests.unit.test_curriculum import IMAGENET, make_config, plan_of

AREA = {"rule": "area"}


def batch(global_batch_size=4096, **early):
    return {"global_batch_size": global_batch_size, "early_large_batch": early}


@pytest.mark.parametrize(
    ("full", "bandwidth", "most", "expected"),
    [
        (4096, 224, None, 4096),
        (4096, 96, None, 22016),  # 4096 * 5.44 = 22300, down to a multiple of 512
        (4096, 160, None, 7680),  # 4096 * 1.96 = 8028
        (4096, 96, 16384, 16384),
        (4096, 96, 16000, 15872),
        (4096, 96, 4096, 4096),
        (4096, 96, 4500, 4096),
        (64, 96, None, 344),  # 348.4, down to a multiple of 8
        (100, 112, None, 400),
        (7, 112, None, 28),  # a prime: single images
        (1, 16, None, 196),
    ],
)
def test_area_batch__by_hand(full, bandwidth, most, expected):
    assert area_batch(full, 224, bandwidth, most) == expected


@given(st.integers(1, 20_000), st.integers(1, 64), st.integers(1, 64), st.none() | st.integers(1, 200_000))
def test_area_batch__stays_within_an_eighth_below_the_rule(full, bandwidth, size, most):
    assume(bandwidth <= size and (most is None or most >= full))
    found = area_batch(full, size, bandwidth, most)
    exact = full * Fraction(size, bandwidth) ** 2
    exact = exact if most is None else min(exact, Fraction(most))
    assert full <= found <= exact
    assert exact - found <= max(Fraction(full, 8), 1)
    if full % 8 == 0:
        assert found % (full // 8) == 0


@pytest.mark.parametrize("world_size", [1, 8, 64])
@pytest.mark.parametrize("micro", [None, 16, 64])
def test_make_plan__area_rule(world_size, micro):
    early = {"global_batch_size": 4096, "micro_batch_size": micro, "early_large_batch": AREA}
    plan = plan_of(batch=early, world_size=world_size)
    assert [s.global_batch_size for s in plan.stages] == [
        22016,
        7680,
        4096,
    ]  # for any number of processes and micro batches
    lr = 1.5e-4 * 4096 / 256
    assert [s.lr for s in plan.stages] == pytest.approx([lr * math.sqrt(n / 4096) for n in (22016, 7680, 4096)])
    for stage in plan.stages:
        assert stage.accum_steps * stage.micro_batch_size * world_size == stage.global_batch_size
        if micro is not None:
            assert micro / 2 < stage.micro_batch_size / (224 / stage.bandwidth) ** 2 <= micro * 1.05
    assert len(plan.notes) == 0


def test_make_plan__accumulation_falls_where_the_cap_holds_the_batch():
    early = {
        "global_batch_size": 4096,
        "micro_batch_size": 64,
        "early_large_batch": AREA | {"max_global_batch_size": 8192},
    }
    plan = plan_of(batch=early)
    assert [s.global_batch_size for s in plan.stages] == [8192, 7680, 4096]
    accum = [s.accum_steps for s in plan.stages]
    assert accum[0] < accum[1]


@pytest.mark.parametrize("rule", ["area", "list"])
def test_make_plan__lr_is_capped(rule):
    stages = [
        {"compute_fraction": 0.3, "bandwidth": 96, "global_batch_size": 16384},
        {"compute_fraction": 0.3, "bandwidth": 160, "global_batch_size": 6144},
        {"compute_fraction": 0.4, "bandwidth": 224},
    ]
    custom = {"stages": stages} if rule == "list" else {}
    plan = plan_of("custom" if rule == "list" else "etpp", curriculum=custom, batch=batch(rule=rule, max_lr=4e-3))
    sizes = [16384, 6144, 4096] if rule == "list" else [22016, 7680, 4096]
    assert [s.global_batch_size for s in plan.stages] == sizes
    assert [s.lr for s in plan.stages] == pytest.approx([min(4e-3, 2.4e-3 * math.sqrt(n / 4096)) for n in sizes])
    assert plan.stages[0].lr == 4e-3


def test_make_plan__a_list_without_the_rule_scales_as_ever():
    stages = [
        {"compute_fraction": 0.5, "bandwidth": 96, "global_batch_size": 512},
        {"compute_fraction": 0.5, "bandwidth": 224},
    ]
    plans = {
        rule: plan_of("custom", curriculum={"stages": stages}, batch=batch(128, rule=rule)) for rule in ("none", "list")
    }
    assert [s.lr for s in plans["none"].stages] == pytest.approx([1.5e-4 * 2, 1.5e-4 / 2])
    assert [s.lr for s in plans["list"].stages] == pytest.approx([1.5e-4, 1.5e-4 / 2])
    assert [s.num_steps for s in plans["none"].stages] == [s.num_steps for s in plans["list"].stages]


def test_make_plan__constant_is_untouched_by_the_rule():
    assert plan_of("constant", batch=batch(rule="area")) == plan_of("constant")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(1, 8), st.integers(500, 50_000), st.floats(5, 500), st.floats(1, 10))
def test_make_plan__area_rule_keeps_the_budget(eighth, world_size, dataset_size, epochs, cap):
    full = 8 * eighth * world_size
    early = batch(full, rule="area", max_global_batch_size=int(full * cap))
    curriculum = {"warmup_equivalent_epochs": 0}
    try:
        plan = plan_of("etpp", dataset_size, world_size, epochs, batch=early, curriculum=curriculum)
    except ConfigError as error:
        assume("has room for" not in str(error))
        raise
    budget = epochs * dataset_size
    costs = [s.global_batch_size * (s.bandwidth / 224) ** 2 for s in plan.stages]
    assert (
        abs(sum(s.num_steps * cost for s, cost in zip(plan.stages, costs, strict=True)) - budget)
        <= 0.5 * costs[-1] + 1e-6
    )
    previous = 0.0
    for stage, cost, share in zip(plan.stages, costs, (0.2, 0.4, 0.4), strict=True):
        assert abs(stage.num_steps * cost - share * budget) <= 0.5 * (cost + previous) + 1e-6 * budget
        assert stage.num_images == stage.num_steps * stage.global_batch_size
        previous = cost
    assert plan.stages[-1].global_batch_size == full


def test_plan_lr__warm_up_and_cosine_go_with_the_stages_peak():
    plan = plan_of(dataset_size=20_000, batch=batch(512, rule="area"), equivalent_epochs=40)
    warm, peaks = 20 / 40, {s.index: s.lr for s in plan.stages}
    rates = [plan.lr(step) for step in range(plan.num_steps)]
    for step, rate in enumerate(rates):
        t = plan.compute_fraction(step)
        share = t / warm if t < warm else 0.5 * (1 + math.cos(math.pi * (t - warm) / (1 - warm)))
        assert rate == pytest.approx(peaks[plan.stage_at(step).index] * share, abs=1e-12)
    assert rates[0] == 0
    first = plan.stages[0]
    assert all(a < b for a, b in itertools.pairwise(rates[: first.num_steps]))


# ---- faults ----


def test_make_plan__rule_above_what_fits_is_named():
    with pytest.raises(ConfigError) as caught:
        plan_of(
            dataset_size=1000,
            equivalent_epochs=1,
            batch=batch(2048, rule="area"),
            curriculum={"warmup_equivalent_epochs": 0},
        )
    fault = caught.value.faults[0]
    assert fault.startswith("the stage at bandwidth 96 has room for")
    assert "batch.early_large_batch.rule = 'area'" in fault
    assert "lower batch.early_large_batch.max_global_batch_size or raise curriculum.equivalent_epochs" in fault


def test_make_plan__rule_that_does_not_divide_among_the_processes():
    assert plan_of(batch=batch(100), world_size=4)
    with pytest.raises(ConfigError) as caught:
        plan_of(batch=batch(100, rule="area"), world_size=4)
    assert any(
        "'area' chose it for bandwidth 160: make batch.global_batch_size a multiple of 32" in f
        for f in caught.value.faults
    )


@pytest.mark.parametrize(
    ("early", "fault"),
    [
        ({"rule": "area"}, "batch.early_large_batch.rule = 'area' and curriculum.stages[0].global_batch_size both set the batch"),
        ({"max_lr": 1.0}, "batch.early_large_batch.max_lr = 1.0 has no effect with rule = 'none'"),
        ({"max_global_batch_size": 512}, "batch.early_large_batch.max_global_batch_size = 512 has no effect with rule = 'none'"),
        ({"rule": "list", "max_global_batch_size": 512}, "batch.early_large_batch.max_global_batch_size = 512 has no"),
        ({"rule": "list", "max_lr": 9e-4}, "batch.early_large_batch.max_lr = 0.0009 is below the lr at full image size, "),
        ({"rule": "aera"}, "batch.early_large_batch.rule = 'aera' must be one of"),
        ({"rule": "list", "max_lr": 0}, "batch.early_large_batch.max_lr = 0 must be > 0"),
    ],
)  # fmt: skip
def test_config__early_large_batch_faults(early, fault):
    (found,) = faults_of(with_value("batch.early_large_batch", early))
    assert found.startswith(fault)


def test_config__a_cap_below_the_full_batch():
    values = {"data": {"train": "x"}, "batch": batch(4096, rule="area", max_global_batch_size=2048)}
    (fault,) = faults_of(values)
    assert "max_global_batch_size = 2048 is below global_batch_size = 4096" in fault


def test_config__a_list_rule_without_a_list():
    values = {"data": {"train": "x"}, "batch": batch(rule="list")}
    (fault,) = faults_of(values)
    assert fault.startswith("batch.early_large_batch.rule = 'list' needs a global_batch_size in curriculum.stages")
    assert FULL["curriculum"]["stages"][0]["global_batch_size"]  # the config of the cases above has one


# ---- micro batches by stage ----


def test_make_plan__micro_batch_of_each_stage():
    sizes = {"global_batch_size": 4096, "micro_batch_size": 7, "micro_batch_sizes": [1024, 300, 64]}
    plan = plan_of(batch=sizes, world_size=2)
    assert [(s.micro_batch_size, s.accum_steps) for s in plan.stages] == [(1024, 2), (256, 8), (64, 32)]
    plain = plan_of(batch={"global_batch_size": 4096, "micro_batch_size": 7}, world_size=2)
    for stage, other in zip(plan.stages, plain.stages, strict=True):  # nothing that is learned depends on it
        assert (stage.num_steps, stage.global_batch_size, stage.lr) == (
            other.num_steps,
            other.global_batch_size,
            other.lr,
        )


def test_make_plan__micro_batches_for_other_stages():
    with pytest.raises(ConfigError, match="has 2 values, but the plan has 3 stages, at bandwidths 96, 160, 224"):
        plan_for(make_config(batch={"micro_batch_sizes": [64, 32]}), IMAGENET)
