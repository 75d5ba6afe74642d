"""What differs on macOS, shown on Linux: loader processes are spawned, and there is no /proc and no affinity."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.runs import provenance
from mae_et.tasks.pretrain import MAETask
from mae_et.tasks.run import run_training
from tests.conftest import REPOSITORY, losses, small_values

VALUES = {"data__num_workers": 2, "run__loggers": ["csv"], "run__num_pictures": 1}
SCRIPT = """
import multiprocessing, os, pathlib, sys
from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.engine.hardware import available_memory, process_memory
from mae_et.tasks.pretrain import MAETask
from mae_et.tasks.run import run_training
from tests.conftest import small_values
from tests.integration.test_platforms import VALUES

def read_text(path, *args, real=pathlib.Path.read_text, **kwargs):
    if path.parts[1:2] in (("proc",), ("sys",)):
        raise FileNotFoundError(path)
    return real(path, *args, **kwargs)

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    pathlib.Path.read_text = read_text
    del os.sched_getaffinity
    assert available_memory() is None and process_memory("VmRSS") == 0
    run_training(MAETask, from_dict(PretrainConfig, small_values(**VALUES)), pathlib.Path(sys.argv[1]), device="cpu")
"""


def test_pretrain__without_fork_and_proc(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command, environment = (
        [sys.executable, script, tmp_path / "run"],
        {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/backbone.safetensors").is_file()
    run_training(MAETask, from_dict(PretrainConfig, small_values(**VALUES)), tmp_path / "forked", device="cpu")
    assert losses(tmp_path / "run") == losses(tmp_path / "forked")


def test_peak_memory__is_in_mb_on_both_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    linux = provenance.peak_memory_mb()
    assert 50 < linux < 100_000
    monkeypatch.setattr(sys, "platform", "darwin")
    assert provenance.peak_memory_mb() == pytest.approx(linux / 1024, rel=0.2)
