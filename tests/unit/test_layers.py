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

# One row per folder (or front-row file) of mae_et: what it may import besides itself. Imports go down only, so a row
# names rows above it alone.
MAY_IMPORT: dict[str, set[str]] = {
    "mae_et": set(),
    "errors": set(),
    "process": set(),
    "lowfreq": {"errors"},
    "frequency": {"errors", "lowfreq"},
    "models": {"errors", "lowfreq"},
    "config": {"errors", "models"},
    "curriculum": {"errors", "models", "config"},
    "storage": {"errors", "models", "config"},
    "data": {"process", "errors", "lowfreq", "models", "config", "curriculum", "storage"},
    "engine": {"errors", "lowfreq", "models", "config", "curriculum", "storage", "data"},
    "evaluation": {"errors", "lowfreq", "frequency", "models", "config", "curriculum", "storage", "data", "engine"},
    "runs": {"errors", "lowfreq", "models", "config", "curriculum", "storage", "data", "engine", "evaluation"},
    "tasks": {
        "process",
        "errors",
        "lowfreq",
        "frequency",
        "models",
        "config",
        "curriculum",
        "storage",
        "data",
        "engine",
        "evaluation",
        "runs",
    },
    "report": {"errors", "models", "config", "curriculum", "storage", "runs"},
    "cli": {"errors", "config"},
    "api": {"errors", "lowfreq", "models", "config", "curriculum", "storage", "data", "engine", "runs", "tasks"},
    "commands": {
        "errors",
        "models",
        "config",
        "curriculum",
        "storage",
        "data",
        "engine",
        "runs",
        "tasks",
        "report",
        "cli",
    },
    "__main__": {"process", "cli"},
}
# The public names of mae_et/__init__.py are imported from here on first use.
PUBLIC = {"api", "config", "lowfreq", "models"}

NEVER = {"downstream", "tools", "tests", "mmdet", "mmseg", "mmcv"}
# Files that import the standard library and each other only: a plan is made, and a config refused, without torch.
WITHOUT_TORCH = {"errors", "config", "curriculum", "models.sizes"}
IMPORTS_MMENGINE = {"config.files"}


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


def row_of(name: str) -> str:
    """Returns the row of a module or of a name in it: "data.stream" -> "data"; a name of mae_et itself -> "mae_et"."""
    first = name.split(".")[0]
    return first if first in MAY_IMPORT else "mae_et"


def is_without_torch(module: str) -> bool:
    return module in WITHOUT_TORCH or module.split(".")[0] in WITHOUT_TORCH


def faults(module: str, source: str) -> list[str]:
    """Returns each rule that a file of mae_et breaks, in words; empty if it keeps all of them.

    Args:
        module: its name below mae_et, e.g. "data.stream".
        source: its text.
    """
    own = module.split(".")[0]
    if own not in MAY_IMPORT:
        return [f"{module} has no row: add one to MAY_IMPORT"]
    found = []
    for name in imported_names(source):
        top, _, below = name.partition(".")
        if top in NEVER:
            found.append(f"imports {name}: mae_et never imports {', '.join(sorted(NEVER))}")
        if top == "mmengine" and module not in IMPORTS_MMENGINE:
            found.append(f"imports {name}: only {', '.join(sorted(IMPORTS_MMENGINE))} imports mmengine")
        if is_without_torch(module):
            third_party = top not in sys.stdlib_module_names and top not in ("mae_et", "mmengine", "pydantic")
            names_module = ".".join(below.split(".")[:2])
            if third_party or (top == "mae_et" and not is_without_torch(names_module) and row_of(below) != "mae_et"):
                found.append(f"imports {name}: {module} must work without torch")
        public = PUBLIC if own == "mae_et" else set()
        if top == "mae_et" and row_of(below) not in MAY_IMPORT[own] | {own, "mae_et"} | public:
            found.append(f"imports {name}: {own} may import {', '.join(sorted(MAY_IMPORT[own])) or 'nothing'}")
    return found


def test_table__goes_down_only():
    rows = list(MAY_IMPORT)
    for index, row in enumerate(rows):
        assert MAY_IMPORT[row] <= set(rows[:index]), row


def test_table__has_a_row_for_each_folder():
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert names - {"__init__"} == set(MAY_IMPORT) - {"mae_et"}


def test_table__the_commands_are_imported_by_nothing():
    assert not [row for row, names in MAY_IMPORT.items() if names & {"commands", "__main__"}]


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
        ("tasks.pretrain", "import mmdet"),
        ("storage.backbone", "def f():\n    from downstream.layer_decay import x"),
        ("storage.backbone", "import importlib\nimportlib.import_module('mmcv.ops')"),
        ("storage.backbone", "from mae_et.curriculum.plan import make_plan"),
        ("engine.trainer", "from mmengine.config import Config"),
        ("config.schema", "import numpy as np"),
        ("config.schema", "from mae_et.models.mae import MaskedAutoencoder"),
        ("curriculum.plan", "from mae_et.lowfreq import low_frequency_crop"),
        ("models.mae", "from mae_et.config.schema import PretrainConfig"),
        ("models.mae", "import mae_et.config"),
        ("models.sizes", "import torch"),
        ("lowfreq", "from mae_et.data.decoding import decode_image"),
        ("lowfreq", "from mae_et import engine"),
        ("data.stream", "from mae_et.engine.trainer import train"),
        ("engine.trainer", "from mae_et.tasks.pretrain import pretrain"),
        ("engine.trainer", "from mae_et.evaluation.collect import collect"),
        ("report.page", "from mae_et.tasks.pretrain import pretrain"),
        (
            "storage.checkpoint",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mae_et.engine import trainer",
        ),
        ("helpers", "import math"),
    ],
)
def test_faults__forbidden_import_is_found(module, source):
    assert len(faults(module, source)) >= 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "runs.folder",
            "import torch\nimport mae_et\nfrom mae_et.config.files import save_config\nfrom mae_et import engine",
        ),
        ("models.mae", "from mae_et.models.sizes import MAE_SIZES, num_visible_patches"),
        (
            "data.sources.spec",
            "from mae_et.data.sources.shards import ShardSource\nfrom mae_et.errors import DataError",
        ),
        ("config.files", "from mmengine.config import Config\nfrom mae_et.config.schema import from_dict"),
        (
            "curriculum.plan",
            "import math\nfrom mae_et.config.schema import PretrainConfig\nfrom mae_et.models.sizes import x",
        ),
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
    """A plan needs no torch: its tool answers at once, and a faulty config is reported before seconds of imports."""
    code = (
        "import sys, mae_et.config.files, mae_et.curriculum.plan\n"
        "heavy = [name for name in ('torch', 'torchvision', 'timm', 'matplotlib', 'cv2') if name in sys.modules]\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names__are_imported_on_first_use():
    code = (
        "import sys, mae_et\n"
        "loaded = [name for name in sys.modules if name.startswith('mae_et.') or name == 'torch']\n"
        "sys.exit(f'imported: {loaded}' if loaded else 0)"
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
