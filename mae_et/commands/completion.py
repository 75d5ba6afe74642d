"""Prints the shell completion of mae-et, for bash or zsh.

Write it where the shell looks: ~/.local/share/bash-completion/completions/mae-et for bash; a file named _mae-et in a folder of
$fpath for zsh.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mae_et.config.shipped import shipped_configs
from mae_et.errors import UserError

GROUP = "mae_et.commands"
EXAMPLE = """example:
  mae-et completion bash
"""
# A config is a shipped one or a file.
PREAMBLE = {
    "bash": '_mae_et_configs() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
    "zsh": "_mae_et_configs() {{ compadd -- {names}; _files }}",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=sorted(PREAMBLE), help="that reads the script")
    return parser


def main(args: argparse.Namespace) -> None:
    print(completion(args.shell, sorted(entry_points(group=GROUP), key=lambda entry: entry.name)))


def completion(shell: str, commands: list[EntryPoint]) -> str:
    """Returns the script that completes commands, options, their choices, names of shipped configs, and files.

    It is static, so that the Tab key starts no Python. Commands whose packages are missing are named on stderr and left out.

    Args:
        shell: "bash" or "zsh".
        commands: modules with `make_parser`.
    Raises:
        UserError: if shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise UserError(
            "the completion is made by shtab, which is not installed: pip install 'mae_et[completion]'"
        ) from error
    parser = argparse.ArgumentParser("mae-et")
    subparsers = parser.add_subparsers()
    for entry in commands:
        try:
            own = entry.load().make_parser()
        except ImportError as error:
            print(f"left out {entry.name}: {error}", file=sys.stderr)
            continue
        summary = (own.description or "").strip().partition("\n")[0]
        command = subparsers.add_parser(entry.name, parents=[own], add_help=False, help=summary, description=summary)
        for action in command._actions:
            if action.dest == "config":
                action.complete = dict.fromkeys(PREAMBLE, "_mae_et_configs")  # type: ignore[attr-defined]
            elif action.choices is None and action.nargs != 0:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    names = " ".join(sorted({*shipped_configs(), *(name.rpartition("/")[2] for name in shipped_configs())}))
    preamble: Any = {key: text.format(names=names) for key, text in PREAMBLE.items()}
    return shtab.complete(parser, shell, preamble=preamble)
