"""Lets the tools run from a checkout that is not installed. Imported before torch: see mae_et/process.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mae_et.process import prepare_process

prepare_process()
