"""The command `mae-et`: its list, its subcommands, and the examples of their help."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys

import pytest

import mae_et
import mae_et.__main__ as command
from mae_et.config.shipped import find_config
from tests.cli.commands import COMMANDS, project
from tests.conftest import REPOSITORY, load_tool

SCRIPTS = {
    "dense-probe": "dense_probe",
    "stats": "dataset_stats",
    "prepare": "prepare_data",
    "scenes": "make_demo_data",
}
KINDS = {
    "classify": ("classification",),
    "dense-probe": ("dense_probe",),
    "train": ("detection", "segmentation"),
    "test": ("detection", "segmentation"),
}
EXAMPLE_LINE = re.compile(r"^  (?:torchrun [-\w ]*-m mae_et|mae-et) ([\w-]+)(.*)$", re.MULTILINE)


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Runs `mae-et WORDS...` in this process and returns its exit code."""
    monkeypatch.setattr(command, "entry_points", lambda group: list(COMMANDS.values()))
    monkeypatch.setattr(sys, "argv", ["mae-et", *words])
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_commands__each_module_is_declared():
    declared = {entry.value for entry in COMMANDS.values()}
    files = {
        f"{package}.commands.{path.stem}"
        for package in ("mae_et", "downstream")
        for path in (REPOSITORY / package / "commands").glob("[!_]*.py")
    }
    assert declared == files
    assert project()["scripts"] == {"mae-et": "mae_et.__main__:main"}


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_list__one_line_for_each_command(words, monkeypatch, capsys):
    assert call(monkeypatch, *words) == 0
    listed = re.findall(r"^  ([\w-]+) +(.+)$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in listed] == sorted(COMMANDS)
    for name, summary in listed:
        assert re.fullmatch(r"[A-Z].{20,110}\.", summary), name


def test_list__imports_no_command():
    """So that it answers at once; downstream alone takes seconds."""
    entries = {name: entry.value for name, entry in COMMANDS.items()}
    code = (
        "import sys\nfrom importlib.metadata import EntryPoint\nimport mae_et.__main__ as command\n"
        f"entries = {entries}\n"
        "command.overview({name: EntryPoint(name, value, command.GROUP) for name, value in entries.items()})\n"
        "heavy = {'torch', 'numpy', 'mmengine', 'pydantic', 'downstream', 'mae_et.commands'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_list__package_of_a_command_is_missing(monkeypatch, capsys):
    entry = COMMANDS["plan"]
    gone = type(entry)("gone", "no_such_package.commands.gone", entry.group)
    assert "its package no_such_package is missing" in command.overview({"gone": gone})
    assert "mae_et is not installed" in command.overview({})


def test_version(monkeypatch, capsys):
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"mae-et {mae_et.__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("pretrian", "did you mean pretrain"),
        ("tets", "test"),
        ("xyz", "`mae-et` lists the commands"),
        ("--fast", "lists"),
    ],
)
def test_unknown_command__names_the_nearest(word, hint, monkeypatch, capsys):
    assert call(monkeypatch, word) == 2
    said = capsys.readouterr().err
    assert repr(word) in said
    assert hint in said


def test_command__runs_with_a_config_by_name(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "plan", "demo", "--cfg-options", "curriculum.preset=constant") == 0
    assert "equivalent epochs" in capsys.readouterr().out


def test_command__usage_has_the_name_of_the_command(monkeypatch, capsys):
    assert call(monkeypatch, "plan") == 2
    assert "usage: mae-et plan" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help__examples_parse(name):
    module = COMMANDS[name].load()
    examples = EXAMPLE_LINE.findall(module.make_parser().format_help())
    assert name in [other for other, _ in examples]
    for other, words in examples:
        args: argparse.Namespace = COMMANDS[other].load().make_parser().parse_args(shlex.split(words))
        if getattr(args, "config", None):  # that of `predict` is optional
            find_config(args.config, KINDS.get(other, ("pretrain",)))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_script__is_the_same_command(name):
    script, module = load_tool(SCRIPTS.get(name, name)), COMMANDS[name].load()
    assert script.main is module.main
    assert script.make_parser is module.make_parser
