"""Runs `mae-et export` from a checkout: `python tools/export.py --help`."""

import _checkout  # noqa: F401

from downstream.commands.export import main, make_parser
from mae_et.cli import run_tool

if __name__ == "__main__":
    run_tool(main, make_parser())
