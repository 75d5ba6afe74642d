"""tools/report.py as a person runs it."""

from __future__ import annotations

import subprocess
import sys
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
    assert done.stdout == f"{tmp_path / 'out' / 'report.html'}: 2 runs: 2 in the tables.\n"
    top = {path.name for path in (tmp_path / "out").iterdir()}
    assert top == {"report.html", "report.md", "report.json", "tables", "figures"}

    done = tool(tmp_path / "runs", "--out", tmp_path / "out1", "--query", "data == 'nothing'")
    assert (done.returncode, (tmp_path / "out1").exists()) == (1, False)
    assert "no run fulfils --query" in done.stderr

    (tmp_path / "empty").mkdir()
    done = tool(tmp_path / "empty", "--out", tmp_path / "out2")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no run in")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out2").exists()
