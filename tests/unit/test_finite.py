"""The guard against NaN where the device decides: tried on a CPU, whose fused AdamW obeys the same flags as a GPU's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mae_et.engine.distributed import World
from mae_et.engine.faults import StopRequest
from mae_et.engine.guard import NonFiniteGuard, stop_at
from mae_et.engine.progress import Progress
from mae_et.engine.stop_vote import StopVote
from mae_et.errors import NonFiniteError


def run_steps(tmp_path: Path, bad_steps: set[int], max_skipped: int, num_steps: int = 6) -> tuple[NonFiniteGuard, list]:
    """Takes steps without looking in between; returns the watch and the weights after each step."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([{"params": [("weight", weight)]}], lr=0.1, fused=True)
    world = World(0, 1, 1, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    watch = NonFiniteGuard(optimizer, world, scaler, Progress(), max_skipped, on_device=True)
    seen = [weight.detach().clone()]
    for step in range(num_steps):
        weight.grad = torch.full((4,), float("nan") if step in bad_steps else 1.0)
        norm = weight.grad.norm()
        finite = watch.look(step, norm.detach(), norm, [torch.tensor([step])], StopVote(StopRequest(), world))
        assert watch.may_update(finite)  # the answer is the device's
        optimizer.step()
        seen.append(weight.detach().clone())
    return watch, seen


def test_finite_watch__on_device_blocks_the_faulty_and_all_later_updates(tmp_path: Path) -> None:
    watch, seen = run_steps(tmp_path, {2}, max_skipped=0)
    assert not torch.equal(seen[2], seen[1])
    assert all(torch.equal(later, seen[2]) for later in seen[3:])
    faulty = watch.faulty_step()
    assert faulty is not None
    with pytest.raises(NonFiniteError, match="step 2"):
        stop_at(faulty, watch.optimizer, lambda path: path.name, tmp_path, is_main=True)
    assert (tmp_path / "nonfinite_step_00000002.json").exists()


def test_finite_watch__on_device_skips_as_many_as_allowed(tmp_path: Path) -> None:
    watch, seen = run_steps(tmp_path, {1, 3}, max_skipped=2)
    assert torch.equal(seen[2], seen[1])
    assert torch.equal(seen[4], seen[3])
    assert not torch.equal(seen[3], seen[2])
    assert not torch.equal(seen[5], seen[4])
    assert watch.faulty_step() is None
    assert watch.progress.num_skipped == 2
    assert all(torch.isfinite(weight).all() for weight in seen)


def test_finite_watch__on_device_skipping_leaves_no_trace(tmp_path: Path) -> None:
    _, skipped = run_steps(tmp_path, {2}, max_skipped=1, num_steps=5)
    _, plain = run_steps(tmp_path, set(), max_skipped=0, num_steps=4)
    torch.testing.assert_close(skipped[-1], plain[-1])


def test_finite_watch__a_loss_scale_that_collapsed_stops_the_run(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([{"params": [("weight", weight)]}], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    world = World(0, 1, 1, torch.device("cpu"))
    watch = NonFiniteGuard(optimizer, world, scaler, Progress(), 0, on_device=True)
    for step in range(3):
        scaler.scale(torch.ones(()))  # starts the scaler
        weight.grad = torch.full((4,), float("inf"))
        scaler.unscale_(optimizer)
        assert watch.may_update(
            watch.look(step, torch.ones(()), torch.tensor(float("inf")), [], StopVote(StopRequest(), world))
        )
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(weight.detach(), torch.ones(4))  # the scaler left out the updates
    with pytest.raises(NonFiniteError, match="loss scale"):
        watch.faulty_step()
