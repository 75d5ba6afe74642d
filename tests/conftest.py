"""What several tests need: a pre-training small enough for a second, and the real images where they are."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the default tests run on the CPU; mark `gpu` for others
# A shell that starts the tests in the background ignores SIGINT, and the tools started by tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    """Imports yapf before the test processes start: after an installation it writes a cache that others must not read half."""
    importlib.import_module("yapf.yapflib.yapf_api")


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(1)  # tests run in parallel processes


@pytest.fixture(autouse=True, scope="session")
def _auto_is_fp32() -> Iterator[None]:
    """Lets run.precision = "auto" mean fp32 on every CPU, so that tests do not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mae_et.engine.precision.cpu_has_bf16", lambda: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _configs_are_not_formatted() -> Iterator[None]:
    """Saves the time of yapf, which is half of that of a short run of mmdet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True))
        yield


@pytest.fixture(autouse=True, scope="session")
def _few_images_for_the_error_by_band() -> Iterator[None]:
    """A run of 24 steps measures it 15 times: on more images that takes a third of the run. test_filters.py tests it in full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mae_et.tasks.bands.NUM_IMAGES", 4)
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with coco_mini, cifar10, ...; tests that use it skip where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}")
    return folder


def small_values(**overrides: Any) -> dict[str, Any]:
    """Returns config values of a run of 24 steps in three stages that takes about a second.

    Args:
        **overrides: dotted keys with "__" for ".", e.g. run__seed=1.
    """
    values: dict[str, Any] = {
        "data": {
            "train": "scenes:20@32,seed=3",
            "image_size": 32,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "num_workers": 0,
        },
        "model": {
            "size": "tiny", "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3,
            "decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2, "mask_ratio": 0.5,
        },
        "curriculum": {
            "preset": "custom",
            "stages": [
                {"compute_fraction": 0.2, "bandwidth": 16, "strength": 0.0},
                {"compute_fraction": 0.4, "bandwidth": 24, "strength": 0.5},
                {"compute_fraction": 0.4, "bandwidth": 32, "strength": 1.0},
            ],
            "equivalent_epochs": 5.2,
            "warmup_equivalent_epochs": 1.0,
        },
        "batch": {"global_batch_size": 8, "micro_batch_size": 8},
        "optimizer": {"base_lr": 0.016},
        "run": {"log_interval": 1, "save_interval": 10, "precision": "fp32", "num_pictures": 0},  # drawing takes longer
    }  # fmt: skip
    for key, value in overrides.items():
        *parents, last = key.split("__")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return values


def losses(work_dir: Path) -> dict[int, float]:
    """Returns the loss of each logged step."""
    from mae_et.storage.metrics_file import read_jsonl

    return {line["step"]: line["loss"] for line in read_jsonl(work_dir / "metrics.jsonl") if "loss" in line}


def load_tool(name: str) -> ModuleType:
    """Imports tools/NAME.py, so that a call costs no start of Python."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", REPOSITORY / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(REPOSITORY / "tools"))
    try:
        spec.loader.exec_module(tool)
    finally:
        sys.path.remove(str(REPOSITORY / "tools"))
    return tool


class Stop(Exception):
    """Stands for a kill."""


def changing_loss(task_type: type, change: Callable[[int, Any], Any]) -> type:
    """Returns a task whose loss is what `change` makes of it.

    Args:
        task_type: of the task to extend.
        change: (number of the micro batch of this process, loss) -> loss; it may raise.
    """

    class Changed(task_type):  # type: ignore[misc]
        num_batches = 0

        def loss(self, model: Any, images: Any, batch: Any) -> Any:
            number, self.num_batches = self.num_batches, self.num_batches + 1
            loss, extra = super().loss(model, images, batch)
            return change(number, loss), extra

    return Changed


def killed_before(task_type: type, step: int) -> type:
    """Returns a task that ends without warning before a step of one micro batch."""

    def change(number: int, loss: Any) -> Any:
        if number >= step:
            raise Stop
        return loss

    return changing_loss(task_type, change)
