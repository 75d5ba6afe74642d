"""Builds the generated parts of the documentation: mkdocs calls the `on_*` functions (see mkdocs.yml).

A page asks for a part by a comment of its own line, `<!-- generate: NAME ARGUMENT -->`. The parts come from the code, so they are
never out of date, and are not committed. Links that leave docs/ become plain text, because the site holds docs/ alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mae_et.config import schema as config_schema  # noqa: E402
from mae_et.config.dense_probe import DenseProbeConfig  # noqa: E402
from mae_et.config.schema import resume_free  # noqa: E402
from mae_et.config.section import Section  # noqa: E402
from mae_et.config.supervised import SupervisedConfig  # noqa: E402
from mae_et.config.validation import schema_node  # noqa: E402
from mae_et.models.sizes import plain_size  # noqa: E402

MARK = re.compile(r"^<!-- generate: (\w+) ?(.*?) -->$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#]*)(?:#[^)]*)?\)")
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
ALIASES = {
    "MaybeNumber": "float or None", "MaybeFraction": "float from 0 to 1, or None", "Number": "float", "Count": "int",
    "Fraction": "float from 0 to 1", "Sides": "int, or list of 2 ints", "Text": "str",
}  # fmt: skip
TYPE_NAMES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "object": "dict"}
CONFIGS = {
    "PretrainConfig": (config_schema.PretrainConfig, "pretrain"),
    "ClassifyConfig": (config_schema.ClassifyConfig, "finetune"),
    "SupervisedConfig": (SupervisedConfig, "supervised"),
    "DenseProbeConfig": (DenseProbeConfig, "dense_probe"),
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fills in the generated parts of a page and unlinks what lies outside docs/."""
    folder = Path(page.file.abs_src_path).parent
    return unlinked(generated(markdown), folder)


def on_config(config: Any, **_: Any) -> None:
    """Rebuilds the site when the code changes (`mkdocs serve`)."""
    config.watch.extend(str(ROOT / folder) for folder in ("mae_et", "tools"))


def generated(markdown: str) -> str:
    """Replaces each `<!-- generate: NAME ARGUMENT -->` by its part.

    Raises:
        KeyError: if there is no part of that name.
    """
    return MARK.sub(lambda match: PARTS[match[1]](match[2]), markdown)


def unlinked(markdown: str, folder: Path) -> str:
    """Turns links to files outside docs/ into their text, with the path from the root of the repository."""

    def replace(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        path = target.relative_to(ROOT).as_posix()
        return match[1] if path in match[1] else f"{match[1]} (`{path}`)"

    return LINK.sub(replace, markdown)


# -------------------------------------------------------------------- config keys


def config_part(name: str) -> str:
    """Returns the keys of a config class as tables, one per section; of others than PretrainConfig only those that it lacks."""
    cls, kind = CONFIGS[name]
    known = (
        set() if name == "PretrainConfig" else set(config_rows(config_schema.PretrainConfig, resume_free("pretrain")))
    )
    sections: dict[str, list[str]] = {}
    for row in config_rows(cls, resume_free(kind)):
        if row not in known:
            sections.setdefault(row[0].rpartition(".")[0], []).append("| " + " | ".join(row) + " |")
    head = "| key | type | default | meaning | may change on resume |\n| --- | --- | --- | --- | --- |\n"
    # The name of the class keeps the headings of two configs on one page apart.
    return "\n\n".join(
        f"### {section or 'top level'} ({name})\n\n{head}" + "\n".join(rows) for section, rows in sections.items()
    )


def config_rows(cls: type[Section], free: frozenset[str], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields (key, type, default, meaning, "yes" or "") of each key, as Markdown."""
    section: Any = cls
    for part in prefix:
        section = section.model_fields[part].annotation
    for name, field in section.model_fields.items():
        path = (*prefix, name)
        if inspect.isclass(field.annotation) and issubclass(field.annotation, Section):
            yield from config_rows(cls, free, path)
            continue
        node = schema_node(cls, path) or {}
        value = field.get_default()
        default = (
            "required"
            if field.is_required()
            else code(plain_size(value) if "or_integer" in node and value is not None else value)
        )
        key = ".".join(path)
        yield key, type_text(cls, node), default, cell(field.description or ""), "yes" if key in free else ""


def type_text(cls: type[Section], node: dict[str, Any]) -> str:
    """Returns a JSON schema node in words, e.g. "int >= 1, or None"."""
    if "enum" in node:
        text = ", ".join(code(value) for value in node["enum"])
    elif node.get("type") == "array":
        items = node.get("prefixItems") or [node["items"]]
        inner = {type_text(cls, item) for item in items if "$ref" not in item}
        text = f"list of {' and '.join(sorted(inner))}" if inner else f"list of rows: {row_keys(cls, items[0])}"
        text += f", {len(items)} values" if "prefixItems" in node else ""
        text = f"{inner.pop()}, or {text}" if "or_integer" in node else text
    else:
        bounds = [f"{sign} {node[name]:,}" for name, sign in BOUNDS.items() if name in node]
        text = " ".join([TYPE_NAMES.get(node.get("type", ""), "value"), " and ".join(bounds)]).strip()
    return f"{text}, or None" if node.get("nullable") else text


def row_keys(cls: type[Section], reference: dict[str, Any]) -> str:
    """Returns the keys of a row of a list, e.g. of `curriculum.stages`."""
    name = reference["$ref"].rsplit("/", 1)[-1]
    return ", ".join(f"`{key}`" for key in cls.model_json_schema()["$defs"][name]["properties"])


def code(value: object) -> str:
    """Returns a value as inline code; tuples as the lists that a config holds."""
    shown = list(value) if isinstance(value, tuple) else value
    return f"`{shown!r}`"


def cell(text: str) -> str:
    """Returns text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


# -------------------------------------------------------------------- command line


def commands_part(_: str) -> str:
    """Returns the help of each tool, as it prints it."""
    parts = []
    for path in tool_paths():
        parser = load_tool(path).make_parser()
        parser.prog = f"python tools/{path.name}"
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")  # as `run_tool` does
        parts.append(f"## {path.stem}\n\n```text\n{help_text(parser)}```")
    return "\n\n".join(parts)


def tool_paths() -> list[Path]:
    """Returns the tools that have a command line."""
    return [
        path for path in sorted((ROOT / "tools").glob("[a-z]*.py")) if "make_parser" in path.read_text(encoding="utf-8")
    ]


def help_text(parser: argparse.ArgumentParser) -> str:
    """Returns the help at a fixed width."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "110"
    try:
        return parser.format_help()
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def load_tool(path: Path) -> ModuleType:
    """Imports a tool by its path."""
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


# -------------------------------------------------------------------- records, columns of the report, files


def records_part(names: str) -> str:
    """Returns the fields of classes of mae_et/runs/records.py, those of their bases included."""
    from mae_et.runs import records

    return "\n\n".join(record_table(getattr(records, name)) for name in names.split())


def record_table(cls: type[BaseModel]) -> str:
    """Returns the fields of a record, with the comments beside them."""
    lines = {name: (kind, text) for base in reversed(cls.__mro__) for name, kind, text in field_lines(base)}
    rows = []
    for name in cls.model_fields:
        kind, comment = lines[name]
        kind = re.sub(r"Annotated\[(\w+), .*\]", r"\1", kind)
        for alias, plain in ALIASES.items():
            kind = re.sub(rf"\b{alias}\b", plain, kind)
        rows.append(f"| `{name}` | {cell(kind)} | {cell(comment)} |")
    head = "| field | type | meaning |\n| --- | --- | --- |\n"
    return f"### {cls.__name__}\n\n{inspect.getdoc(cls)}\n\n{head}" + "\n".join(rows)


def field_lines(cls: type) -> list[tuple[str, str, str]]:
    """Returns (field, annotation, comment) of the fields that a class defines itself, as its source has them."""
    if not cls.__module__.startswith("mae_et."):
        return []
    return re.findall(r"^    (\w+): (.+?)(?: = .+?)?(?:  # (.+))?$", inspect.getsource(cls), re.MULTILINE)


def columns_part(_: str) -> str:
    """Returns the columns of the report's table of runs."""
    from mae_et.report.facts import FACTS

    rows = [f"| `{name}` | {cell(meaning)} |" for name, meaning in FACTS.items()]
    return "| column | meaning |\n| --- | --- |\n" + "\n".join(rows)


def api_part(_: str) -> str:
    """Returns the directive of the public interface where the package has one."""
    return "::: mae_et.api" if (ROOT / "mae_et" / "api.py").is_file() else ""


def file_part(path: str) -> str:
    """Returns a file of the repository as a block of code."""
    return f"```python\n{(ROOT / path).read_text(encoding='utf-8')}```"


PARTS: dict[str, Callable[[str], str]] = {
    "config": config_part,
    "commands": commands_part,
    "records": records_part,
    "columns": columns_part,
    "file": file_part,
    "api": api_part,
}
