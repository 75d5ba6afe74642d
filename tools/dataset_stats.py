"""Runs `mae-et stats` from a checkout: `python tools/dataset_stats.py --help`."""

import _checkout  # noqa: F401

from mae_et.cli import run_tool
from mae_et.commands.stats import main, make_parser

if __name__ == "__main__":
    run_tool(main, make_parser())
