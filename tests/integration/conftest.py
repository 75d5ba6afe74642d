"""What the tests of the tools share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.tasks.pretrain import pretrain
from tests.conftest import small_values


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small pre-training run; not to be written into."""
    work_dir = tmp_path_factory.mktemp("run") / "small"
    values = small_values(curriculum__equivalent_epochs=1.5, curriculum__warmup_equivalent_epochs=0.5)
    pretrain(from_dict(PretrainConfig, values), work_dir, device="cpu")
    return work_dir


@pytest.fixture(scope="session")
def checkpoint(small_run: Path) -> Path:
    """The last checkpoint of the small run."""
    return sorted((small_run / "checkpoints").glob("step_*.pt"))[-1]
