"""Lets the tools run from a checkout that is not installed. Imported before torch: see mae_et/__init__.py for why."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mae_et  # noqa: F401
