"""Cores of a container, and shared memory, before loader processes start."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest

from mae_et.data.buffers import check_shared_memory
from mae_et.errors import UserError
from mae_et.process import available_cores

OWN = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("content", "cores"),
    [("max 100000", OWN), ("50000 100000", 1), ("100000 100000", 1), ("100001 100000", min(2, OWN)), ("junk", OWN)],
)
def test_available_cores__quota_of_version_2(tmp_path, content, cores):
    (tmp_path / "cpu.max").write_text(content + "\n")
    assert available_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [(-1, OWN), (100000, 1), (10**8, OWN)])
def test_available_cores__quota_of_version_1(tmp_path, quota, cores):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert available_cores(tmp_path) == cores


def test_available_cores__without_control_groups(tmp_path):
    assert available_cores(tmp_path) == OWN


def test_check_shared_memory__refuses_what_does_not_fit(tmp_path, monkeypatch):
    """2 processes x (3 workers x 4 batches + 3 held) x 8 images of 3 x 32 x 32 bytes = 737,280 bytes."""
    stages = [SimpleNamespace(micro_batch_size=n, input_size=(16, 16)) for n in (4, 8)]
    plan = SimpleNamespace(stages=stages, image_size=(32, 32), local_world_size=2)
    for free, fits in ((737_280, True), (737_279, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if fits:
            check_shared_memory(plan, False, 3, 3, tmp_path)
        else:
            with pytest.raises(UserError, match=r"lower data\.num_workers \(3\)"):
                check_shared_memory(plan, False, 3, 3, tmp_path)
    check_shared_memory(plan, False, 0, 3, tmp_path)
    check_shared_memory(plan, False, 3, 3, tmp_path / "absent")
