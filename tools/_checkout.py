"""Lets the tools run from a checkout that is not installed. Imported before torch: see mae_et/process.py."""

import sys
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

_absent = [name for name in ("torch", "timm", "mmengine", "pydantic") if find_spec(name) is None]
if _absent:
    environment = _ROOT / ".venv" / "bin" / "activate"
    fix = f"activate the environment: . {environment}" if environment.is_file() else f"make it: make -C {_ROOT} env"
    sys.exit(f"error: {sys.executable} has no package {', '.join(_absent)}; {fix}")

from mae_et.process import prepare_process  # noqa: E402

prepare_process()
