"""Each command that a page or a config header prints is one that its tool takes; those that need little data run.

Names of tools, options, files and config keys in messages are checked in test_hints.py.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from torch.distributed.run import get_args_parser

from mae_et.config.dense_probe import DenseProbeConfig
from mae_et.config.files import load_config, save_config
from mae_et.config.schema import ClassifyConfig, PretrainConfig, from_dict
from mae_et.config.supervised import SupervisedConfig
from mae_et.runs.record_files import read_summary
from tests.cli.commands import COMMANDS as DECLARED
from tests.conftest import REPOSITORY, load_tool, small_values
from tests.docs.pages import DOCS, PROGRAMS, TEXTS, Command, blocks, commands, page_commands

HEADER_COMMAND = re.compile(r"^Command: +(.*?)(?=^\w+:|\Z)", re.MULTILINE | re.DOTALL)
CONFIGS = sorted(path for path in (REPOSITORY / "configs").glob("*/*.py") if path.parent.name != "_base_")
SCHEMAS = {
    "pretrain": PretrainConfig,
    "plan": PretrainConfig,
    "classify": ClassifyConfig,
    "supervised": SupervisedConfig,
    "dense_probe": DenseProbeConfig,
}


def load_module(script: str) -> ModuleType:
    """Imports the script of a command, e.g. tools/plan.py or docs/examples/add_task.py."""
    path = REPOSITORY / script
    assert path.is_file(), f"{script} does not exist"
    if path.parent.name == "tools":
        tool = load_tool(path.stem)
        sys.modules[tool.__name__] = tool  # its classes go to loader processes by name
        return tool
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parses words; a mistake fails the test with the parser's message."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        try:
            return parser.parse_args(list(words))
        except SystemExit as stop:
            if stop.code:
                pytest.fail(f"{' '.join(words)}: {errors.getvalue().splitlines()[-1]}")
            return argparse.Namespace()  # --help


def check(words: Sequence[str]) -> None:
    """Fails the test if a command would not be understood."""
    program, *rest = words
    if program == "python" and rest[:1] == ["-c"]:
        ast.parse(rest[1])
    elif program == "python":
        check_script(rest[0], rest[1:])
    elif program == "torchrun":
        known = parse(get_args_parser(), rest)
        if known.module:
            check(["mae-et", *known.training_script_args])
        else:
            check_script(known.training_script, known.training_script_args)
    elif program == "mae-et":
        found = [entry for name, entry in DECLARED.items() if rest and name == rest[0]]
        if rest and not found:
            pytest.skip(f"the command mae-et {rest[0]} is not installed here")
        if rest:
            parse(found[0].load().make_parser(), rest[1:])
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert [word for word in rest if "=" not in word and word not in targets] == []
    elif program == "pip":
        assert rest[0] in ("install", "uninstall")
        files = [word for before, word in pairwise(rest) if before == "-r"]
        assert [name for name in files if not (REPOSITORY / name).is_file()] == []
    else:
        assert program in ("export", "."), f"unknown command {program}: extend this test"


def check_script(script: str, words: Sequence[str]) -> None:
    args = parse(load_module(script).make_parser(), words)
    config = getattr(args, "config", None)
    if config is None or config.isupper():  # CONFIG stands for any
        return
    schema = SCHEMAS.get(Path(script).stem)
    if schema is not None and (REPOSITORY / config).is_file():
        load_config(schema, REPOSITORY / config, args.cfg_options)  # each key and value
    else:
        assert (REPOSITORY / config).is_file() or config.startswith("work_dirs/"), f"{config} does not exist"


def found_commands() -> list[Command]:
    """Returns the commands of all pages and of the headers of all configs."""
    found = [command for page in TEXTS for command in page_commands(page)]
    for path in [*CONFIGS, DOCS / "examples" / "add_preset.py"]:
        header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for text in HEADER_COMMAND.findall(header):
            found += commands("\n".join(command_lines(text)), str(path.relative_to(REPOSITORY)))
    return found


def command_lines(text: str) -> Iterator[str]:
    """Yields the commands of a header, without the remarks between them. "make demo (or: python ...)" holds two."""
    text = re.sub(r"\(or: (.*)\)", r"\n\1", text.replace("\\\n", " "))
    text = re.sub(r" \([^()]*\)$", "", text, flags=re.MULTILINE)  # a remark
    for line in map(str.strip, text.splitlines()):
        if re.sub(r"^([A-Z0-9_]+=\S* )*", "", line).split(" ")[0] in PROGRAMS:
            yield line


COMMANDS = found_commands()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.where}: {' '.join(command.words)[:60]}")
def test_command__is_understood(command):
    check(command.words)


def test_commands__are_found():
    """So that a change of the pages' form cannot empty the test above."""
    per_page = {where: sum(command.where == where for command in COMMANDS) for where in {c.where for c in COMMANDS}}
    assert per_page["README.md"] >= 8
    assert per_page["docs/tutorials/your_images.md"] >= 6
    assert sum(where.startswith("configs/") for where in per_page) >= len(CONFIGS) - 2


@pytest.mark.parametrize(
    "line",
    [
        "python tools/absent.py x",
        "python tools/plan.py configs/pretrain/absent.py",
        "python tools/plan.py configs/pretrain/demo.py --worldsize 2",
        "python tools/pretrain.py configs/pretrain/demo.py --cfg-options data.imgsize=3",
        "python tools/pretrain.py configs/pretrain/demo.py --cfg-options data.image_size=3.5",
        "torchrun --nproc 8 --no-such-option tools/pretrain.py configs/pretrain/demo.py",
        "torchrun --nproc_per_node 8 tools/pretrain.py configs/pretrain/absent.py",
        "make absent",
        "pip install -r absent.txt",
        "absent-command x",
    ],
)
def test_check__finds_mistakes(line):
    (command,) = commands(line, "here")
    with pytest.raises((Exception, pytest.fail.Exception)):
        check(command.words)


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_python_blocks__compile_and_name_what_exists(page):
    public = importlib.import_module("mae_et")
    for block in blocks(page):
        if block.language != "python":
            continue
        tree = ast.parse(block.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mae_et"):
                module: Any = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), block.text
            is_public = (
                isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mae_et"
            )
            if is_public and (REPOSITORY / "mae_et" / "api.py").is_file():
                assert hasattr(public, node.attr), f"mae_et.{node.attr}"


# -------------------------------------------------------------------- running


# The pages whose commands run in order on small data, with what makes them small: (printed, run).
SMALLER = [
    ("--num-train 400 --num-val 100", "--num-train 60 --num-val 20"),
    ("curriculum.equivalent_epochs=20", "curriculum.equivalent_epochs=1 batch.global_batch_size=16 run.num_pictures=1"),
    ("warmup_equivalent_epochs=1", "warmup_equivalent_epochs=0.1"),
    ("warmup_equivalent_epochs=2", "warmup_equivalent_epochs=0.1"),
    (
        "two_stages",
        "two_stages --cfg-options data.train=scenes:60@64 data.num_images=60 batch.global_batch_size=8 "
        "curriculum.equivalent_epochs=1 curriculum.warmup_equivalent_epochs=0.1",
    ),
    ("--dataset-size 400", "--dataset-size 60"),
    ("batch.global_batch_size=32", "batch.global_batch_size=8"),
    ("/data/photos", "work_dirs/tutorial/photos/train"),
    ("images.npy", "work_dirs/images.npy"),
    ("docs/examples/add_preset.py work_dirs/", "work_dirs/small.py work_dirs/"),
]
RUN = ("tutorials/your_images.md", "tutorials/judge_a_backbone.md", "guides/small_sets.md", "guides/extending.md")
LARGE = ("mae_base", "imagenet_finetune", "imagenet_linear")  # trainings that need a GPU


def runs_here(command: Command) -> bool:
    """Whether a command is one of our scripts and small enough for a test."""
    script = next((word for word in command.words if word.endswith(".py")), "")
    is_ours = command.words[0] == "python" and script.startswith(("tools/", "docs/examples/"))
    return is_ours and (script == "tools/plan.py" or not any(name in " ".join(command.words) for name in LARGE))


@pytest.mark.slow
def test_pages__run_as_printed(tmp_path, monkeypatch):
    """The tutorials and guides on small data, command by command, in the order of the pages."""
    for name in ("tools", "configs", "docs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "work_dirs").mkdir()
    save_config(from_dict(PretrainConfig, small_values()), tmp_path / "work_dirs" / "small.py", "A small run.")
    np.save(tmp_path / "work_dirs" / "images.npy", np.zeros((20, 64, 64, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    num_run = 0
    for page in RUN:
        for command in page_commands(DOCS / page):
            if not runs_here(command):
                continue
            line = " ".join(f"'{word}'" if re.search(r"[\s\"\[{]", word) else word for word in command.words)
            for printed, small in SMALLER:
                line = line.replace(printed, small)
            (small_command,) = commands(line, page)
            script, *words = small_command.words[1:]
            module = load_module(script)
            module.main(parse(module.make_parser(), words))
            num_run += 1
    assert num_run >= 14
    assert Path("work_dirs/tutorial/report/report.html").is_file()
    assert Path("work_dirs/tutorial/features.safetensors").is_file()
    trained, judged = (read_summary(Path("work_dirs/tutorial") / run / "summary.json") for run in ("run", "knn"))
    assert judged.initial_weights.encoder_sha256 == trained.encoder_sha256  # so the report joins them
