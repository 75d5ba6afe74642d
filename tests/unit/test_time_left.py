"""The time left that a run shows."""

from __future__ import annotations

import pytest

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.curriculum.plan import Plan
from mae_et.engine import time_left
from mae_et.engine.progress import Progress, StageStats
from mae_et.engine.time_left import TimeLeft
from tests.conftest import small_values
from tests.plans import plan_for


@pytest.fixture
def plan() -> Plan:
    plan = plan_for(from_dict(PretrainConfig, small_values()), 20)
    assert len(plan.stages) > 1
    return plan


def run_stage(
    plan: Plan, progress: Progress, seconds: float, waiting: float = 0.0, num_steps: int | None = None
) -> None:
    """Adds steps of the first stage to the progress. The times are for each image."""
    stage = plan.stages[0]
    num_steps = num_steps or stage.num_steps
    num_images = num_steps * stage.global_batch_size
    progress.step += num_steps
    old = progress.stages.get(0, StageStats())
    progress.stages[0] = StageStats(
        old.num_images + num_images, old.seconds + seconds * num_images, old.waiting_seconds + waiting * num_images
    )


def later(plan: Plan) -> list[tuple[int, float]]:
    """Images and relative FLOPs of the stages after the first one."""
    flops = plan.stages[0].forward_flops
    return [(stage.num_images, stage.forward_flops / flops) for stage in plan.stages[1:]]


def test_time_left__computing_grows_with_the_flops(plan: Plan) -> None:
    progress = Progress()
    left = TimeLeft(plan, progress)
    assert left.seconds() is None  # no step yet
    left.step_done()
    run_stage(plan, progress, seconds=0.5)
    assert left.seconds() == pytest.approx(sum(num * 0.5 * flops for num, flops in later(plan)))


def test_time_left__loading_does_not(plan: Plan) -> None:
    progress = Progress()
    left = TimeLeft(plan, progress)
    left.step_done()
    run_stage(plan, progress, seconds=1.0, waiting=0.999)
    assert left.seconds() == pytest.approx(sum(num for num, _ in later(plan)))
    progress.stages[0].waiting_seconds = progress.seconds / 2
    assert left.seconds() == pytest.approx(sum(num * max(1, 0.5 * flops) for num, flops in later(plan)))


def test_time_left__counts_hooks_but_not_the_start(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time_left.time, "monotonic", lambda: now)
    progress = Progress()
    left = TimeLeft(plan, progress)
    now = 1000.0  # the loader starts, and the untrained model is judged
    left.step_done()
    run_stage(plan, progress, seconds=0.5)
    trained = progress.seconds
    now += 3 * trained
    assert left.seconds() == pytest.approx(3 * sum(num * 0.5 * flops for num, flops in later(plan)))


def test_time_left__of_a_resumed_run_is_at_the_speed_of_this_machine(plan: Plan) -> None:
    progress = Progress()
    run_stage(plan, progress, seconds=100.0, num_steps=1)  # elsewhere
    left = TimeLeft(plan, progress)
    left.step_done()
    assert left.seconds() is None
    run_stage(plan, progress, seconds=0.5, num_steps=plan.stages[0].num_steps - 1)
    assert left.seconds() == pytest.approx(sum(num * 0.5 * flops for num, flops in later(plan)))
