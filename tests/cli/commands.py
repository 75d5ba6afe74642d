"""The subcommands that pyproject.toml declares, whether the package is installed or not."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from typing import Any

from mae_et.__main__ import GROUP
from tests.conftest import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def project() -> dict[str, Any]:
    """Returns the table [project] of pyproject.toml."""
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


COMMANDS = {name: EntryPoint(name, value, GROUP) for name, value in project()["entry-points"][GROUP].items()}
