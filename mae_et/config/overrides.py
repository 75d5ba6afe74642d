"""`--cfg-options KEY=VALUE`: values arrive as written, and the schema's type of the key says how to read them.

| type | written as |
| --- | --- |
| str | the text itself: spaces, commas, braces and names such as `2024` or `true` stay as they are |
| int, float, bool | `64`, `1e-3`, `True` or `true` |
| X or None | `None`, otherwise as X |
| list | `0.9,0.95` or `[0.9,0.95]` |
| int or list | `224`, or `360,480` |
| list of rows, dict | a Python literal: `[{"compute_fraction": 1.0, "bandwidth": 224}]`; a dict is merged, `{}` empties it |
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from mae_et.config.section import Section
from mae_et.config.validation import schema_node
from mae_et.errors import ConfigError

_BOOLS = {"True": True, "true": True, "False": False, "false": False}


class KeyValueAction(argparse.Action):
    """Collects KEY=VALUE words as a dict of raw strings."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        options = dict(getattr(namespace, self.dest))
        for word in values or ():
            key, equals, value = word.partition("=")
            if not equals or not key:
                parser.error(
                    f"{option_string}: {word!r} is not KEY=VALUE. A value with spaces needs quotes: "
                    f"{option_string} 'data.train=/data/my photos'. Other arguments go before {option_string}"
                )
            options[key] = value
        setattr(namespace, self.dest, options)


def apply_overrides(cls: type[Section], values: dict[str, Any], overrides: Mapping[str, Any], where: str) -> None:
    """Sets dotted keys in nested dicts and lists, in place. Unknown keys are left for `from_dict` to report.

    Args:
        cls: the config class, for the types.
        values: of the config file.
        overrides: dotted keys, e.g. "curriculum.stages.0.bandwidth"; text is converted, other values are taken as they are.
        where: the file, for the message.
    Raises:
        ConfigError: if a key goes through something that is neither a dict nor a list with that position, or rows cannot be
            read.
    """
    for key, value in overrides.items():
        parts = [int(part) if part.isdecimal() else part for part in key.split(".")]
        node = schema_node(cls, parts)
        if isinstance(value, str) and node is not None:
            text, value = value, convert(value, node)
            if value == text and node.get("type") == "array":
                raise ConfigError(
                    [
                        f"{key} = {text!r} cannot be read: write rows as a Python literal, e.g. "
                        "[{'bandwidth': 96, 'compute_fraction': 0.2}]"
                    ],
                    where,
                )
        if isinstance(value, Mapping) and value:  # merged, as a section of a config file is; {} empties it
            apply_overrides(cls, values, {f"{key}.{name}": item for name, item in value.items()}, where)
        else:
            _set(values, parts, value, key, where)


def convert(text: str, node: Mapping[str, Any]) -> Any:
    """Reads a value from the command line by its schema; returns text that does not fit unchanged, to be reported."""
    if text == "None" and node.get("nullable"):
        return None
    kind = node.get("type")
    if kind == "boolean":
        return _BOOLS.get(text, text)
    if kind == "array":
        if node.get("or_integer") and text.strip().isdecimal():
            return int(text)
        return _convert_list(text, node)
    with suppress(ValueError, SyntaxError):
        if kind == "integer":
            return int(text)
        if kind == "number":
            return float(text)
        if kind in ("object", None):  # None: an item of a dict of anything
            return ast.literal_eval(text)
    return text


def _convert_list(text: str, node: Mapping[str, Any]) -> Any:
    items = [*node.get("prefixItems", []), node["items"]] if "items" in node else node.get("prefixItems", [])
    if any("type" not in item or item["type"] == "array" for item in items):  # rows, which are dicts
        with suppress(ValueError, SyntaxError):
            return ast.literal_eval(text)
        return text
    inner = text.strip()
    if inner[:1] + inner[-1:] in ("[]", "()"):
        inner = inner[1:-1]
    words = [_without_quotes(word.strip()) for word in inner.split(",")] if inner.strip() else []
    if words and not words[-1]:  # "(10,)"
        words.pop()
    return [convert(word, items[min(i, len(items) - 1)]) for i, word in enumerate(words)]


def _without_quotes(word: str) -> str:
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"" else word


def _set(values: dict[str, Any], parts: Sequence[int | str], value: Any, key: str, where: str) -> None:
    node: Any = values
    for depth, part in enumerate(parts):
        is_place = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if not is_place and not isinstance(node, dict):
            size = f", a list of {len(node)}" if isinstance(node, list) else ""
            raise ConfigError(
                [f"--cfg-options {key}: {part!r} cannot be reached, because its parent is {node!r}{size}"], where
            )
        if depth == len(parts) - 1:
            node[part] = value
        else:
            node = node[part] if is_place else node.setdefault(part, {})
