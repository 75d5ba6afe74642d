"""The command `mae-et` (also `python -m mae_et`): lists the subcommands and runs one of them.

A subcommand is an entry point of the group `mae_et.commands`: a module with `make_parser` and `main`. So other packages can
add their own, and only the chosen one is imported.
"""

from __future__ import annotations

import ast
import difflib
import sys
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

import mae_et
from mae_et.cli import run_tool
from mae_et.process import prepare_process

GROUP = "mae_et.commands"


def main() -> None:
    """Runs the subcommand that the command line names, and exits."""
    commands = {entry.name: entry for entry in entry_points(group=GROUP)}
    words = sys.argv[1:]
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(overview(commands))
    elif name == "--version":
        print(f"mae-et {mae_et.__version__}")
    elif name in commands:
        prepare_process()
        command = commands[name].load()
        parser = command.make_parser()
        parser.prog = f"mae-et {name}"
        run_tool(command.main, parser, words[1:])
    else:
        near = difflib.get_close_matches(name, commands, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`mae-et` lists the commands"
        print(f"error: unknown command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)


def overview(commands: dict[str, EntryPoint]) -> str:
    """Returns the help of `mae-et`: each subcommand with the first line of its docstring, nothing imported."""
    width = max(map(len, commands), default=0)
    lines = [f"  {name:<{width}}  {_summary(entry.module)}" for name, entry in sorted(commands.items())]
    return "\n".join(
        [
            "usage: mae-et COMMAND ...",
            "",
            "Pre-train vision backbones with masked autoencoders under the EfficientTrain++ curriculum, and evaluate them.",
            "",
            "commands:",
            *(lines or ["  none: mae_et is not installed. Run `pip install .` in its checkout"]),
            "",
            "`mae-et COMMAND --help` describes a command. Several GPUs: torchrun --nproc_per_node 8 -m mae_et COMMAND ...",
        ]
    )


def _summary(module: str) -> str:
    """Returns the first line of a module's docstring without importing the module or its packages."""
    package, *names = module.split(".")
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        path = Path(folder, *names).with_suffix(".py")
        if path.is_file():
            return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    return f"its package {package} is missing: install it again"


if __name__ == "__main__":
    main()
