"""Runs `mae-et dense-probe` from a checkout: `python tools/dense_probe.py --help`."""

import _checkout  # noqa: F401

from mae_et.cli import run_tool
from mae_et.commands.dense_probe import main, make_parser

if __name__ == "__main__":
    run_tool(main, make_parser())
