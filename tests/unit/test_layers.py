"""The rules of the code base that no linter keeps: imports go down only, and the text speaks of this project alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PACKAGE = REPOSITORY / "mae_et"

# From the ground up. A file imports from its own row or from rows before it; a folder stands for all files in it.
LEVELS = (
    ("mae_et",),
    ("errors",),
    ("config_check", "dims", "hardware"),
    ("config",),
    ("flops", "replay_plan"),
    ("config_io", "curriculum"),
    ("strict",),
    ("models", "optim", "lowfreq"),
    ("data", "checkpoint", "metrics", "distributed", "export", "visualize", "finite", "train_log", "run_folder"),
    ("train",),
    ("evaluate", "classifier"),
    ("pretrain", "classify", "cli", "report"),
    ("micro_batch",),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}

NEVER = {"downstream", "tools", "tests", "mmdet", "mmseg", "mmcv"}
PURE = {"errors", "config_check", "dims", "hardware", "config", "flops", "replay_plan", "curriculum"}
READ_CONFIG_FILES = {"run_folder", "cli"}


def module_name(path: Path) -> str:
    """Path below mae_et/ -> "data.loader"; a package's __init__.py -> the package; mae_et/__init__.py -> "mae_et"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "mae_et"


def imported_names(source: str) -> Iterator[str]:
    """All that a file imports, wherever in the file, as full dotted names: `from a.b import c` -> "a.b.c"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                yield str(node.args[0].value)


def level_name(name: str) -> str:
    """Row entry of a module or of a name in it: "data.loader" -> "data"; what is no row entry is mae_et's own name."""
    return name.split(".")[0]


def faults(module: str, source: str) -> list[str]:
    """Returns each rule that a file of mae_et breaks, in words; empty if it keeps them all.

    Args:
        module: its name below mae_et, e.g. "data.loader".
        source: its text.
    """
    own = level_name(module)
    if own not in LEVEL_OF:
        return [f"{module} has no level: give it one in LEVELS"]
    found = []
    for name in imported_names(source):
        top, _, below = name.partition(".")
        if top in NEVER:
            found.append(f"imports {name}: mae_et imports nothing of {', '.join(sorted(NEVER))}")
        if top == "mmengine" and module != "config_io":
            found.append(f"imports {name}: only config_io.py imports mmengine")
        if own in PURE and top not in sys.stdlib_module_names:
            pure = top == "mae_et" and level_name(below) in PURE
            if not pure:
                found.append(f"imports {name}: {own} is standard library only, and what is like it")
        if top != "mae_et":
            continue
        other = level_name(below)
        if other not in LEVEL_OF:  # `import mae_et`, `from mae_et import __version__`
            other = "mae_et"
        if LEVEL_OF[other] > LEVEL_OF[own]:
            found.append(f"imports {name}: {own} is below {other}")
        if other == "config_io" and own not in READ_CONFIG_FILES:
            found.append(f"imports {name}: config files are read by {', '.join(sorted(READ_CONFIG_FILES))} only")
        if own in ("models", "optim", "lowfreq") and other in ("config", "flops", "curriculum"):
            found.append(f"imports {name}: {own} takes plain arguments, never a config or a plan")
    return found


def tracked_files() -> list[Path]:
    """The files that are or would be committed; without git, those that are not under a hidden or generated folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
        paths = [REPOSITORY / name for name in listing.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        folders = ("mae_et", "downstream", "tools", "configs", "tests", "docs", "benchmarks", "results")
        paths = [path for folder in folders for path in (REPOSITORY / folder).rglob("*")]
        paths += REPOSITORY.glob("*")
    return [path for path in paths if path.is_file() and "__pycache__" not in path.parts]


# Put together here, so that this file does not contain what it looks for.
HOSTS = [".".join(name) for name in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))]
FOREIGN = re.compile(
    "|".join(re.escape(host) for host in HOSTS) + r"|(?<![\w.~)}\]$/-])/(?:work|root)(?=/|[\s\"'`,;:)\]]|$)",
    re.MULTILINE,
)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: module_name(path))
def test_imports__go_down_only(path):
    assert faults(module_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pretrain", "import mmdet"),
        ("export", "def f():\n    from downstream.layer_decay import x"),
        ("export", "import importlib\nimportlib.import_module('mmcv.ops')"),
        ("train", "from mmengine.config import Config"),
        ("config", "import numpy as np"),
        ("curriculum", "from mae_et.lowfreq import low_frequency_crop"),
        ("curriculum", "from mae_et.config_io import load_config"),
        ("models.mae", "from mae_et.config import PretrainConfig"),
        ("models.mae", "import mae_et.config"),
        ("models.targets", "from mae_et.config import ModelConfig"),
        ("optim", "from mae_et.curriculum import Plan"),
        ("lowfreq", "from mae_et.data.images import decode_image"),
        ("lowfreq", "from mae_et import train"),
        ("data.loader", "from mae_et.train import train"),
        ("train", "from mae_et.pretrain import pretrain"),
        ("train", "from mae_et.config_io import load_config"),
        ("checkpoint", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mae_et.train import train"),
        ("helpers", "import math"),
    ],
)
def test_faults__forbidden_import_is_found(module, source):
    assert len(faults(module, source)) >= 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "run_folder",
            "import torch\nimport mae_et\nfrom mae_et.config_io import save_config\nfrom mae_et import train_log",
        ),
        ("models.mae", "from mae_et.dims import MAE_SIZES, num_visible_patches"),
        ("data.sources", "from mae_et.data.shards import ShardSource\nfrom mae_et.errors import DataError"),
        ("config_io", "from mmengine.config import Config\nfrom mae_et.config import from_dict"),
        ("curriculum", "import math\nfrom mae_et.config import PretrainConfig\nfrom mae_et.errors import ConfigError"),
    ],
)
def test_faults__allowed_imports_pass(module, source):
    assert faults(module, source) == []


def test_tools__are_imported_by_nothing():
    for folder in ("mae_et", "downstream"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            names = list(imported_names(path.read_text(encoding="utf-8")))
            assert not [name for name in names if name.split(".")[0] in ("tools", "tests")], path


def test_config_and_curriculum__import_no_torch():
    """A plan needs no torch: its tool answers at once, and a faulty config is told before seconds of imports."""
    code = (
        "import sys, mae_et.config_io, mae_et.curriculum\n"
        "heavy = [name for name in ('torch', 'torchvision', 'timm', 'matplotlib', 'cv2') if name in sys.modules]\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_core__imports_neither_downstream_nor_mm_packages():
    """Someone who only pre-trains installs none of them."""
    names = sorted(f"mae_et.{module_name(path)}" for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        "never = {'downstream', 'mmcv', 'mmdet', 'mmseg', 'cv2'} & set(sys.modules)\n"
        "sys.exit(f'imported: {never}' if never else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_downstream__backbones_need_no_mm_package():
    """So that a backbone file can be proved where they are not installed."""
    code = (
        "import sys\n"
        "for name in ('cv2', 'mmcv', 'mmdet', 'mmseg'): sys.modules[name] = None\n"  # as if they were absent
        "import downstream.doctor"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_tree__has_no_utils():
    assert [path for path in tracked_files() if path.name in ("utils.py", "util.py")] == []


def test_text__speaks_of_this_project_alone():
    found, num_read = [], 0
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or an archive
        num_read += 1
        for match in FOREIGN.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(REPOSITORY)}:{line}: {match.group()}")
    assert num_read > 10
    assert found == []


@pytest.mark.parametrize(
    "text",
    ["https://" + HOSTS[0] + "/simple", "cd /" + "work/main", 'open("/' + 'root/x")', "at /" + "work", *HOSTS],
)
def test_foreign__is_found(text):
    assert FOREIGN.search(text)


@pytest.mark.parametrize(
    "text", ["/work_dirs/", "work_dirs/demo", "path/root/x", "{tmp}/work/x", "data/train", "$HOME/work/x", "/workspace"]
)
def test_foreign__leaves_other_paths_alone(text):
    assert not FOREIGN.search(text)
