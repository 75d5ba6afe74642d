"""Random streams that follow from the seed and the step alone, so that a resumed run goes on to the same losses."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

_DATA, _MODEL = 0, 1


@HOOKS.register_module()
class StepSeedHook(Hook):
    """Seeds Python's, numpy's and torch's streams anew for each batch and for each step of the model.

    mmengine restores weights, optimizer, schedule and the order of the images, but no random stream. With this hook what a
    step draws (drop path, sampled proposals, and with `num_workers=0` the augmentation) depends on `randomness.seed`, the
    step and the process. Loader processes have streams of their own, which start anew when a run is resumed.
    """

    priority = "LOWEST"

    def before_train_epoch(self, runner: Any) -> None:
        seed_streams(runner.seed, runner.iter, _DATA)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        seed_streams(runner.seed, runner.iter, _MODEL)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        seed_streams(runner.seed, runner.iter + 1, _DATA)

    def after_val(self, runner: Any) -> None:
        seed_streams(runner.seed, runner.iter, _DATA)


def seed_streams(seed: int, step: int, purpose: int) -> None:
    """Seeds the global streams of this process.

    Args:
        seed: of the run, 0 or more.
        step: steps done.
        purpose: tells apart what is drawn at the same step.
    """
    numbers = np.random.SeedSequence((seed, step, purpose, get_rank())).generate_state(3)
    random.seed(int(numbers[0]))
    np.random.seed(numbers[1])
    torch.manual_seed(int(numbers[2]))
