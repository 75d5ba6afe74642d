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
    plan = plan_for(from_dict(PretrainConfig, small_values(curriculum__equivalent_epochs=30.0)), 20)
    assert len(plan.stages) == 3
    assert plan.stages[0].num_steps > 20
    return plan


class Clock:
    """Stands in for the time; steps take it."""

    def __init__(self, plan: Plan, progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan, self.progress, self.now = plan, progress, 1000.0
        monkeypatch.setattr(time_left.time, "monotonic", lambda: self.now)

    def train(self, num_steps: int, seconds: float, waiting: float = 0.0) -> None:
        """Adds steps of the current stage. The times are for each image; waiting is among the seconds."""
        stage = self.plan.stage_at(self.progress.step)
        stats = self.progress.stages.setdefault(stage.index, StageStats())
        num_images = num_steps * stage.global_batch_size
        self.progress.step += num_steps
        stats.num_images += num_images
        stats.seconds += seconds * num_images
        stats.waiting_seconds += waiting * num_images
        self.now += seconds * num_images

    def left(self, seconds: float, floor: float = 0.0) -> float:
        """Returns the time that is left if images of the first stage take `seconds` to compute, and all `floor` to load."""
        first, total = self.plan.stages[0].forward_flops, 0.0
        for stage in self.plan.stages:
            num_steps = max(0, min(stage.num_steps, stage.first_step + stage.num_steps - self.progress.step))
            total += num_steps * stage.global_batch_size * max(seconds * stage.forward_flops / first, floor)
        return total


def test_time_left__computing_grows_with_the_flops_and_loading_does_not(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress()
    clock, estimate = Clock(plan, progress, monkeypatch), TimeLeft(plan, progress)
    assert estimate.seconds() is None  # no step yet
    clock.train(5, seconds=0.5)
    assert estimate.seconds() == pytest.approx(clock.left(0.5))
    clock.train(5, seconds=0.5)
    assert estimate.seconds() == pytest.approx(clock.left(0.5))

    progress = Progress()
    clock, estimate = Clock(plan, progress, monkeypatch), TimeLeft(plan, progress)
    clock.train(5, seconds=1.0, waiting=0.6)
    assert estimate.seconds() == pytest.approx(clock.left(0.4, floor=1.0))
    assert clock.left(0.4, floor=1.0) < 0.8 * clock.left(1.0)


def test_time_left__a_slow_start_counts_at_the_first_entry_only(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()
    clock, estimate = Clock(plan, progress, monkeypatch), TimeLeft(plan, progress)
    clock.now += 900  # before the training: the untrained model is judged
    clock.train(1, seconds=100.0)  # the loader starts, or a graph is compiled
    estimate.seconds()
    clock.train(10, seconds=0.5)
    assert estimate.seconds() == pytest.approx(clock.left(0.5))
    # The same at the first step of another stage.
    clock.train(plan.stages[0].num_steps - 11, seconds=0.5)
    clock.train(1, seconds=100.0)
    estimate.seconds()
    flops = plan.stages[1].forward_flops / plan.stages[0].forward_flops
    clock.train(2, seconds=0.5 * flops)
    assert estimate.seconds() == pytest.approx(clock.left(0.5))


def test_time_left__counts_hooks(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()
    clock, estimate = Clock(plan, progress, monkeypatch), TimeLeft(plan, progress)
    clock.train(5, seconds=0.5)
    estimate.seconds()
    before = progress.seconds
    clock.train(5, seconds=0.5)
    clock.now += 2 * (progress.seconds - before)
    assert estimate.seconds() == pytest.approx(3 * clock.left(0.5))


def test_time_left__of_a_resumed_run_is_at_the_speed_of_this_machine(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress()
    clock = Clock(plan, progress, monkeypatch)
    clock.train(5, seconds=100.0)  # elsewhere
    estimate = TimeLeft(plan, progress)
    assert estimate.seconds() is None
    clock.train(5, seconds=0.5)
    assert estimate.seconds() == pytest.approx(clock.left(0.5))
