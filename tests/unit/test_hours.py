"""Budgets in hours from artificial speeds: what is solved, what is refused, and which limit binds."""

import dataclasses

import pytest

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.curriculum.cost import mae_cost
from mae_et.curriculum.hours import (
    TRIAL_STEPS,
    Measurement,
    StageSpeed,
    run_seconds,
    scale_budget,
    solve_budget,
    trial_plan,
)
from mae_et.curriculum.limits import binding_limits
from mae_et.curriculum.plan import make_plan
from mae_et.errors import ConfigError, UserError
from tests.conftest import small_values

NUM_IMAGES = 1000


def config_of(**overrides):
    return from_dict(PretrainConfig, small_values(**overrides))


def plan_of(config, epochs, num_processes=1):
    return make_plan(scale_budget(config, epochs), mae_cost(config.model), NUM_IMAGES, num_processes)


def speeds(plan, *rates):
    return [
        StageSpeed(stage.bandwidth, stage.global_batch_size, rate, 2 * rate, 2 * rate, None, 2**30, None)
        for stage, rate in zip(plan.stages, rates, strict=True)
    ]


def seconds_of(config, *rates, beside=lambda plan: 0.0, num_processes=1):
    def seconds(epochs):
        try:
            plan = plan_of(config, epochs, num_processes)
        except ConfigError:
            return None
        return run_seconds(plan, speeds(plan, *rates), beside)

    return seconds


def test_scale_budget__keeps_the_ratios_of_the_recipe():
    config = config_of(curriculum__baseline_equivalent_epochs=20.8, curriculum__budget_hours=8.0)
    scaled = scale_budget(config, 10.4).curriculum
    assert (scaled.equivalent_epochs, scaled.budget_hours) == (10.4, None)
    assert scaled.warmup_equivalent_epochs == pytest.approx(2.0)
    assert scaled.baseline_equivalent_epochs == pytest.approx(41.6)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"replay": {"mode": "mix", "stages": [{"bandwidth": 16, "factor": 4, "size": 4}]}},
        {"replay": {"mode": "alternate", "stages": [{"bandwidth": 16, "factor": 4, "size": 4}]}},
        {"batch": {"global_batch_size": 8, "micro_batch_size": 2}},
        {"batch": {"global_batch_size": 8, "early_large_batch": {"rule": "area"}}},
    ],
)
@pytest.mark.parametrize("num_processes", [1, 2])
def test_solve_budget__the_run_ends_in_time_and_uses_it(overrides, num_processes):
    config = config_of(**overrides)
    seconds = seconds_of(config, 900.0, 300.0, 100.0, beside=lambda plan: 5.0 + 0.01 * plan.num_steps,
                         num_processes=num_processes)  # fmt: skip
    epochs = solve_budget(seconds, 3600, 60)
    assert 0.995 * 3540 < seconds(epochs) <= 3540
    # By hand: fractions .2, .4, .4 of the budget at 1/4, 9/16 and 1 of the full size's cost.
    if not overrides and num_processes == 1:
        images = [0.2 * 4, 0.4 * 16 / 9, 0.4]
        each = NUM_IMAGES * sum(n / rate + 0.01 * n / 8 for n, rate in zip(images, (900, 300, 100), strict=True))
        assert epochs == pytest.approx((3540 - 5) / each, rel=0.01)


def test_solve_budget__has_four_digits_and_is_the_same_again():
    seconds = seconds_of(config_of(), 900.0, 300.0, 100.0)
    epochs = solve_budget(seconds, 1e5, 0)
    assert epochs == float(f"{epochs:.4g}") == solve_budget(seconds, 1e5, 0)


def test_solve_budget__too_few_hours_names_the_smallest_that_work():
    seconds = seconds_of(config_of(), 9.0, 3.0, 1.0)
    with pytest.raises(
        UserError, match=r"is too short: 60 s pass .* smallest budget that works here is (\S+) hours"
    ) as error:
        solve_budget(seconds, 65, 60)
    smallest = float(str(error.value).split("works here is ")[1].split()[0])
    epochs = solve_budget(seconds, smallest * 3600, 60)
    assert all(stage.num_steps >= 1 for stage in plan_of(config_of(), epochs).stages)


def test_trial_plan__has_steps_for_a_measurement_with_any_budget():
    for epochs in (0.001, 5.2, 1e4):
        config = scale_budget(config_of(), epochs)
        plan = trial_plan(config, mae_cost(config.model), NUM_IMAGES, 2)
        assert min(stage.num_steps for stage in plan.stages) >= TRIAL_STEPS
        assert plan.num_steps < 100 * TRIAL_STEPS


def test_trial_plan__names_faults_that_no_budget_repairs():
    config = config_of()
    with pytest.raises(ConfigError, match="does not divide among 3 processes"):
        trial_plan(config, mae_cost(config.model), NUM_IMAGES, 3)


def limit_of(loader, step, workers=2, cores=8, cpu=0.95, both=None, **overrides):
    config = config_of(**overrides)
    plan = plan_of(config, 5.2)
    both = min(loader, step) if both is None else both
    stages = tuple(
        dataclasses.replace(
            s, images_per_second=both, loader_images_per_second=loader, step_images_per_second=step, loader_cpu_fraction=cpu
        )
        for s in speeds(plan, 1.0, 1.0, 1.0)
    )  # fmt: skip
    lines = binding_limits(config, plan, Measurement("CPU", 1, workers, stages, 0.0, 0.0, 0.0), cores)
    assert [line.split(":")[0] for line in lines] == ["bandwidth 16", "bandwidth 24", "bandwidth 32"]
    return lines[0]


def test_binding_limits__names_the_limit_and_the_fix():
    assert "the step's compute limits" in limit_of(1000, 100)
    slow = limit_of(100, 1000)
    assert "the cores of the loader limit" in slow
    assert "Raise data.num_workers from 2 to 7" in slow
    assert "mae-et prepare" in slow
    assert 'replay.mode = "mix"' in slow
    assert "All 3 cores are in use" in limit_of(100, 1000, cores=3)
    assert "disk or network limits" in limit_of(100, 1000, cpu=0.2)
    assert "the cores of the loader or the disk limit" in limit_of(100, 1000, cpu=None)
    assert "loading takes 80% of the time" in limit_of(100, 400, workers=0, both=80, cpu=None)
    replay = {"mode": "mix", "stages": [{"bandwidth": 16, "factor": 2, "size": 4}]}
    assert 'replay.mode = "mix"' not in limit_of(100, 1000, replay=replay)
