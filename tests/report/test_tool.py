"""tools/report.py as a person runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.report.folders import classify, pretrain

pytestmark = pytest.mark.slow


def tool(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/report.py", *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_report__writes_and_refuses(tmp_path: Path) -> None:
    pretrain(tmp_path / "runs" / "a")
    classify(tmp_path / "runs" / "knn", "a", 0.5)
    done = tool(tmp_path / "runs", "--out", tmp_path / "out", "--baseline", "a")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'out' / 'report.html'}: 2 runs: 2 in the tables, 0 not.\n"
    top = {path.name for path in (tmp_path / "out").iterdir()}
    assert top == {"report.html", "report.md", "report.json", "tables", "figures"}

    done = tool(tmp_path / "runs", "--out", tmp_path / "out1", "--filter", "data=nothing")
    assert (done.returncode, (tmp_path / "out1").exists()) == (1, False)
    assert "no run fulfils --filter 'data=nothing'" in done.stderr

    (tmp_path / "empty").mkdir()
    done = tool(tmp_path / "empty", "--out", tmp_path / "out2")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no run in")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out2").exists()


def test_report__watches_until_ctrl_c(tmp_path: Path) -> None:
    """A line for each writing; new runs come in, and what goes wrong on the way is said and does not end it."""
    pretrain(tmp_path / "runs" / "a", finished=False)
    command = [
        sys.executable,
        "-u",
        "tools/report.py",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out"),
        "--watch",
        "0.2",
    ]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "1 run: 0 in the tables, 1 not." in process.stdout.readline()
        pretrain(tmp_path / "runs" / "b", seed=1, seconds=50.0)
        deadline = time.monotonic() + 300
        while "2 runs: 1 in the tables, 1 not." not in (line := process.stdout.readline()):
            assert time.monotonic() < deadline, line
        assert "nothing new" in process.stdout.readline()
        os.rename(tmp_path / "runs", tmp_path / "gone")
        while "not written: no such folder" not in (line := process.stdout.readline()):
            assert time.monotonic() < deadline, line
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr is not None
        assert process.stderr.read().strip() == "interrupted"
    assert not list((tmp_path / "out").rglob(".*"))
