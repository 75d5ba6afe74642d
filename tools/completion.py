"""Runs `mae-et completion` from a checkout: `python tools/completion.py --help`."""

import _checkout  # noqa: F401

from mae_et.cli import run_tool
from mae_et.commands.completion import main, make_parser

if __name__ == "__main__":
    run_tool(main, make_parser())
