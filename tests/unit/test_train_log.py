"""The meter of a run: what counts as training time."""

import time
from types import SimpleNamespace

import pytest
import torch

from mae_et.engine.distributed import World
from mae_et.engine.progress import Meter, Progress


@pytest.fixture
def meter():
    return Meter(Progress(), World(0, 1, 1, torch.device("cpu")))


def test_paused__leaves_out_what_is_beside_but_not_what_the_device_still_does(meter, monkeypatch):
    """The host runs ahead of a GPU: the steps that it has not finished yet are the training's, not the hook's."""
    monkeypatch.setattr(Meter, "_wait_for_device", lambda self: time.sleep(0.1))
    meter.add({}, torch.tensor(1.0), SimpleNamespace(index=0, global_batch_size=8))
    with meter.paused():
        time.sleep(0.3)
    rate = meter.flush()
    seconds = meter.progress.stages[0].seconds
    assert 0.1 <= seconds < 0.25
    assert rate == pytest.approx(8 / seconds)
