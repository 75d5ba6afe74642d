"""Runs `mae-et supervised` from a checkout: `python tools/supervised.py --help`."""

import _checkout  # noqa: F401

from mae_et.cli import run_tool
from mae_et.commands.supervised import main, make_parser

if __name__ == "__main__":
    run_tool(main, make_parser())
