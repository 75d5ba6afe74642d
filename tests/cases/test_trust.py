"""Pickles that run code: none may, in any tool of detection and segmentation, unless it is asked for."""

from __future__ import annotations

import pickle

import pytest
import torch

from mae_et.errors import CheckpointError
from tests.conftest import REPOSITORY
from tests.downstream.conftest import needs_mm
from tests.downstream.runs import METRICS, SHORT, main, train, words, write_data

pytestmark = [pytest.mark.mm, needs_mm]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mm"))


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return eval, (f"__import__('pathlib').Path({str(self.mark)!r}).touch()",)


class Indirect(Evil):
    """Reaches the same function through `getattr`, which mmengine's list of safe names has."""

    def __reduce__(self):
        return getattr, (Evil(self.mark), "x")


def write(kind, path, mark):
    content = {"state_dict": {}, "meta": {"x": (Indirect if kind == "getattr" else Evil)(mark)}}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    return path


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy", "getattr"])
@pytest.mark.parametrize("way", ["test", "resume", "load_from"])
def test_case__F1_no_pickle_runs(data, tmp_path, kind, way):
    mark, config = tmp_path / "ran", REPOSITORY / "configs/detection/demo.py"
    evil = write(kind, tmp_path / "evil.pth", mark)
    arguments = {
        "test": ("test", config, evil),
        "resume": ("train", config, "--resume", evil),
        "load_from": ("train", config, "--cfg-options", f"load_from={evil}", *words(SHORT)),
    }[way]
    with pytest.raises(CheckpointError, match=r"evil\.pth cannot be read.*--trust-checkpoint"):
        main(data, arguments[0], *arguments[1:], "--work-dir", tmp_path / "run")
    assert not mark.exists()


def test_case__F1_trust_is_asked_for(data, tmp_path):
    mark = tmp_path / "ran"
    evil = write("zip", tmp_path / "evil.pth", mark)
    with pytest.raises(CheckpointError, match="missing"):  # it is read, and does not fit
        main(
            data,
            "test",
            REPOSITORY / "configs/detection/demo.py",
            evil,
            "--trust-checkpoint",
            "--work-dir",
            tmp_path / "run",
        )
    assert mark.exists()
    mark.unlink()
    with pytest.raises(CheckpointError, match="--trust-checkpoint"):  # trust ends with the command
        main(data, "test", REPOSITORY / "configs/detection/demo.py", evil, "--work-dir", tmp_path / "run")
    assert not mark.exists()


@pytest.mark.parametrize("task", METRICS)
def test_case__F1_what_training_writes_needs_no_trust(data, tmp_path, task):
    train(data, task, tmp_path)
    saves = sorted(tmp_path.glob("*.pth"))
    assert len(saves) >= 2
    for path in saves:
        content = torch.load(path, weights_only=True)  # without any name allowed beside torch's own
        assert {"state_dict", "meta", "message_hub"} <= content.keys()
