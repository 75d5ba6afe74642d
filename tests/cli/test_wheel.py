"""The wheel in a new environment without the checkout: the command, the configs by name, the Python interface."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY

SOURCES = ("mae_et", "downstream", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TINY_DEMO = ["curriculum.equivalent_epochs=1", "curriculum.warmup_equivalent_epochs=0.1", "batch.global_batch_size=16"]
TINY_DEMO += ["data.image_size=64"]

pytestmark = pytest.mark.slow


def run(*words: object, cwd: Path) -> str:
    """Runs a command that must end well; returns its output."""
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder bin/ of an environment with the wheel.

    The packages that the wheel needs are those of this environment, through a .pth file. It is written after the
    installation, so that pip does not see the editable installation there.
    """
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    source.mkdir()
    for name in SOURCES:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root / "dist", source, cwd=root)
    shutil.rmtree(source)
    run(sys.executable, "-m", "venv", "--without-pip", root / "env", cwd=root)
    python, (wheel,) = root / "env/bin/python", (root / "dist").glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=root)
    (packages,) = (root / "env/lib").glob("python3*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return root / "env/bin"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 JPEG files in two classes."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(48):
        path = root / ("sea", "land")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), np.uint8))
        coarse.resize((96, 72), Image.Resampling.BICUBIC).save(path)
    return root


def test_wheel__is_imported_from_the_environment(environment: Path, tmp_path: Path) -> None:
    code = "import mae_et, downstream; print(mae_et.__file__, downstream.__file__)"
    for file in run(environment / "python", "-c", code, cwd=tmp_path).split():
        assert Path(file).is_relative_to(environment.parent)
    listed = run(environment / "mae-et", cwd=tmp_path)
    assert "  pretrain " in listed
    assert "  train " in listed
    assert "missing" not in listed


def test_wheel__commands_on_generated_scenes(environment: Path, tmp_path: Path) -> None:
    plan = run(environment / "mae-et", "plan", "mae_base_etpp_400e_imagenet", "--world-size", 8, cwd=tmp_path)
    assert "4096 = 8 x 4 x 128" in plan
    words = [
        "pretrain",
        "demo",
        "--device",
        "cpu",
        "--cfg-options",
        *TINY_DEMO,
        "data.train=scenes:48@64",
        "data.val=None",
    ]
    assert "backbone: work_dirs/demo/backbone.safetensors" in run(environment / "mae-et", *words, cwd=tmp_path)
    words = ["classify", "demo_knn", "--backbone", "work_dirs/demo", "--device", "cpu", "--cfg-options"]
    words += ["data.image_size=64", "data.train=scenes:32@64", "data.val=scenes:16@64,seed=1", "knn.ks=[5]"]
    assert "knn: top-1" in run(environment / "python", "-m", "mae_et", *words, cwd=tmp_path)
    assert (tmp_path / "work_dirs/demo_knn/summary.json").is_file()
    run(environment / "mae-et", "report", "work_dirs", "--out", "report", cwd=tmp_path)
    assert "demo_knn" in (tmp_path / "report/report.html").read_text()


def test_wheel__python_on_a_folder_of_photos(environment: Path, photos: Path, tmp_path: Path) -> None:
    overrides = {
        "curriculum.equivalent_epochs": 4,
        "curriculum.warmup_equivalent_epochs": 0.5,
        "batch.global_batch_size": 16,
        "data.image_size": 64,
    }
    script = f"""
import mae_et
summary = mae_et.pretrain({str(photos)!r}, "work_dirs/photos", config="demo", overrides={overrides})
model = mae_et.load_encoder("work_dirs/photos")
print(summary["last_loss"] < summary["first_loss"], sum(p.numel() for p in model.parameters()) > 0)
"""
    assert run(environment / "python", "-c", script, cwd=tmp_path).split() == ["True", "True"]


@pytest.mark.mm
def test_wheel__configs_of_detection_and_segmentation(environment: Path, tmp_path: Path) -> None:
    code = """
import sys
from downstream.commands.train import TASKS
from downstream.run import read_config
from mae_et.config.shipped import find_config, shipped_folder
assert shipped_folder().parent.name == "mae_et", shipped_folder()
for name in ("detection/demo", "segmentation/demo", "mask_rcnn_vitdet_base_coco_100e"):
    print(read_config(find_config(name, TASKS)).model.type)
"""
    types = run(environment / "python", "-c", code, cwd=tmp_path).split()
    assert types[0] == "MaskRCNN"
