"""Random streams that depend on the seed and the step alone, so that a resumed run has the same losses."""

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
    """Seeds the streams of Python, numpy and torch for each batch and for each step of the model.

    mmengine restores weights, optimizer, schedule and the order of the images, but no random stream. With this hook the draws
    of a step (drop path, sampled proposals, and with `num_workers=0` the augmentation) depend on `randomness.seed`, the step
    and the process. Loader processes have their own streams, which start again when a run is resumed.
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
        purpose: separates the streams of one step.
    """
    numbers = np.random.SeedSequence((seed, step, purpose, get_rank())).generate_state(3)
    random.seed(int(numbers[0]))
    np.random.seed(numbers[1])
    torch.manual_seed(int(numbers[2]))
