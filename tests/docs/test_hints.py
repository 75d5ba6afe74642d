"""Messages and docstrings of the code name only tools, options, files, targets and config keys that exist."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from mae_et.config.schema import ClassifyConfig, PretrainConfig
from mae_et.config.supervised import SupervisedConfig
from mae_et.config.validation import schema_node
from tests.conftest import REPOSITORY, load_tool

SOURCES = sorted(path for folder in ("mae_et", "downstream", "tools") for path in (REPOSITORY / folder).rglob("*.py"))
# Options of programs that are not ours, in commands that messages print.
OTHER_OPTIONS = {
    "--nproc_per_node", "--force-reinstall", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--help", "--debug",
    "--standalone", "--master_port", "--shm-size", "--max-restarts", "--signal",
}  # fmt: skip
SECTIONS = "data|model|curriculum|batch|optimizer|replay|run|regularization|knn"

TOOL = re.compile(r"(?<![\w/.-])tools/(\w+)\.py")
OPTION = re.compile(r"(?<![\w-])(?<!var\()(--[a-z][\w-]*[a-z])(?![\w-]*\*)")
TOOL_WITH_OPTION = re.compile(r"tools/(\w+)\.py(?: [A-Z]+)* (--[a-z][\w-]*)")
FILE = re.compile(r"(?<![\w/.-])((?:docs|configs|mae_et)/[\w/]+\.\w+)")
TARGET = re.compile(r"`?make ([a-z]+(?:-[a-z]+)*)`")
KEY = re.compile(rf"(?<![\w./-])((?:{SECTIONS})\.[a-z_]+(?:\.[a-z_]+)*)(?=(?: ?= ?|=)[\w'\"\[])")


def texts(path: Path) -> Iterator[str]:
    """Yields the strings of a file that hold several words; f-strings have "{}" in place of the values."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            text = node.value
        else:
            continue
        if " " in text:  # else a name in the code, such as a variable of CSS
            yield text


@cache
def options(tool: str) -> set[str]:
    """Returns the options of a tool, those of its subcommands included."""
    found, waiting = set(), [load_tool(tool).make_parser()]
    while waiting:
        for action in waiting.pop()._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
    return found


@cache
def tools_with_options() -> tuple[str, ...]:
    return tuple(
        path.stem
        for path in (REPOSITORY / "tools").glob("[a-z]*.py")
        if "make_parser" in path.read_text(encoding="utf-8")
    )


@cache
def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def faults(text: str) -> Iterator[str]:
    """Yields what a text names and does not exist."""
    for name in TOOL.findall(text):
        if not (REPOSITORY / "tools" / f"{name}.py").is_file():
            yield f"tools/{name}.py"
    known = OTHER_OPTIONS.union(*map(options, tools_with_options()))
    yield from (option for option in OPTION.findall(text) if option not in known)
    for name, option in TOOL_WITH_OPTION.findall(text):
        if name in tools_with_options() and option not in options(name) | OTHER_OPTIONS:
            yield f"tools/{name}.py {option}"
    yield from (name for name in FILE.findall(text) if not (REPOSITORY / name).is_file())
    yield from (f"make {name}" for name in TARGET.findall(text) if name not in makefile_targets())
    for key in KEY.findall(text):
        if all(schema_node(cls, key.split(".")) is None for cls in (PretrainConfig, ClassifyConfig, SupervisedConfig)):
            yield key


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_texts__name_what_exists(path):
    # Configs of mmdetection and mmsegmentation have keys of their own under model and data.
    is_mm = path.is_relative_to(REPOSITORY / "downstream")
    found = [fault for text in texts(path) for fault in faults(text) if not (is_mm and fault.startswith("model."))]
    assert found == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("run tools/absent.py", "tools/absent.py"),
        ("start again with --resumes", "--resumes"),
        ("tools/plan.py CONFIG --resume", "tools/plan.py --resume"),
        ("see docs/absent.md", "docs/absent.md"),
        ("configs/pretrain/absent.py", "configs/pretrain/absent.py"),
        ("run `make absent`", "make absent"),
        ("set data.valid = None", "data.valid"),
        ("use --cfg-options run.presision=bf16", "run.presision"),
    ],
)
def test_faults__finds(text, fault):
    assert list(faults(text)) == [fault]


@pytest.mark.parametrize(
    "text",
    ["tools/plan.py CONFIG --fit-micro-batch", "data.val = None", "docs/index.md", "`make env-mm`", "--cfg-options a=1",
     "run.precision = 'bf16'"],
)  # fmt: skip
def test_faults__leaves_what_exists(text):
    assert list(faults(text)) == []


def test_texts__f_strings_are_read(tmp_path):
    (tmp_path / "code.py").write_text(
        'raise ValueError(f"{path}: use --absent or {x} --resume")\nprint("plain text", "--word")\n'
    )
    assert sorted(texts(tmp_path / "code.py")) == ["plain text", "{}: use --absent or {} --resume"]
