"""Nested dicts -> frozen config, with all faults reported at once, in the words of the config file.

pydantic finds the faults of single values; the messages are written from the JSON schema of the config. Checks between
fields run afterwards, also when some values are faulty: see `mae_et.config.section`.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BeforeValidator, ValidationError

from mae_et.config.section import Section, check_faults
from mae_et.errors import ConfigError

S = TypeVar("S", bound=Section)
Location = tuple[int | str, ...]  # keys and list positions, from the whole config down

_NOUNS = {
    "integer": "an int", "number": "a float", "string": "a str", "boolean": "a bool", "array": "a list", "object": "a dict",
}  # fmt: skip
_BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
_OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
_FAULTY = object()


def from_dict(cls: type[S], values: Mapping[str, Any], where: str = "config") -> S:
    """Builds a frozen config from nested dicts.

    Args:
        cls: the config class, e.g. PretrainConfig.
        values: nested mappings of plain values. Keys that begin with "_" are ignored.
        where: the file, for the message.
    Raises:
        ConfigError: with all faults: unknown keys (and the nearest known one), wrong types, values out of range, options
            without effect, values that do not fit together.
    """
    if isinstance(values, Mapping) and (message := cls.other_kind(values)):
        raise ConfigError([message], where)
    faults: list[str] = []
    try:
        config = cls.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        faults += dict.fromkeys(_message(cls, item["type"], item["loc"], item["input"]) for item in errors)
        config = _build_partly(cls, values, [item["loc"] for item in errors])
    faults += check_faults(config)
    if faults:
        raise ConfigError(faults, where)
    return config


def to_dict(config: Section) -> dict[str, Any]:
    """Returns the config as nested dicts of plain values, tuples as lists."""
    return config.model_dump(mode="json")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys and their values; an empty dict is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def schema_node(cls: type[Section], location: Sequence[int | str]) -> dict[str, Any] | None:
    """Returns the JSON schema of one key, with "nullable" added; None for an unknown key.

    Args:
        cls: the config class.
        location: keys and list positions.
    """
    node = _resolve(cls, _json_schema(cls))
    for part in location:
        if isinstance(part, int):
            fixed = node.get("prefixItems", [])
            child = fixed[part] if 0 <= part < len(fixed) else node.get("items")
        else:
            child = node.get("properties", {}).get(part, node.get("additionalProperties") or None)
        if child is None:
            return None
        node = {} if child is True else _resolve(cls, child)  # True: a dict of anything
    return node


@functools.cache
def _json_schema(cls: type[Section]) -> dict[str, Any]:
    return cls.model_json_schema()


def _resolve(cls: type[Section], node: dict[str, Any]) -> dict[str, Any]:
    """Follows a reference, and takes X from "X or None"."""
    if "$ref" in node:
        return _json_schema(cls)["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    if "anyOf" in node:  # the configs use `X | None` only
        (inner,) = [option for option in node["anyOf"] if option.get("type") != "null"]
        return {**_resolve(cls, inner), "nullable": True}
    return node


def _message(cls: type[Section], kind: str, location: Location, value: Any) -> str:
    """Words one of pydantic's errors: the dotted key, the value, what is allowed."""
    name = _dotted(location) or "the config"
    value = list(value) if isinstance(value, tuple) else value  # as it was most likely written
    if kind in ("extra_forbidden", "invalid_key"):
        parent = schema_node(cls, location[:-1]) or {}
        near = difflib.get_close_matches(str(location[-1]), parent.get("properties", {}), n=1)
        hint = (
            f"did you mean {_dotted((*location[:-1], near[0]))}?"
            if near
            else f"known: {', '.join(parent['properties'])}"
        )
        return f"unknown key {name}; {hint}"
    if kind == "missing" and isinstance(location[-1], str):
        return f"{name} is missing"
    if kind in ("missing", "too_long"):  # a list of fixed length
        location = location[:-1] if kind == "missing" else location
        node = schema_node(cls, location) or {}
        return f"{_dotted(location)} = {value!r} must have {len(node['prefixItems'])} values"
    node = schema_node(cls, location) or {}
    hint = ""
    if "enum" in node:
        allowed = f"one of {', '.join(map(repr, node['enum']))}"
        near = difflib.get_close_matches(str(value), [str(choice) for choice in node["enum"]], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    elif kind in _OUT_OF_RANGE:
        allowed = " and ".join(f"{sign} {node[key]:g}" for key, sign in _BOUNDS if key in node) or "finite"
    elif node.get("or_integer"):
        allowed = "an int of 1 or more, or a list of two: height and width"
    else:
        allowed = _NOUNS[node["type"]]
    return f"{name} = {value!r} must be {allowed}{' or None' if node.get('nullable') else ''}{hint}"


def _dotted(location: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _build_partly(cls: type[S], values: Any, faulty: Sequence[Location]) -> S:
    """Builds a section without its faulty fields. Reading one of them raises FaultyFieldError."""
    config: S = cls.model_construct()  # type: ignore[assignment]  # the defaults; required fields have none
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if name in cls.model_fields:
            field = cls.model_fields[name]
            built = _build_value(field.annotation, value, _below(faulty, name))
            for step in field.metadata if built is not _FAULTY else ():
                if isinstance(step, BeforeValidator):
                    convert: Any = step.func  # without pydantic's info argument
                    built = convert(built)
            vars(config).pop(name, None)
            if built is not _FAULTY:
                vars(config)[name] = built
    return config


def _build_value(annotation: Any, value: Any, faulty: Sequence[Location]) -> Any:
    if () in faulty:
        return _FAULTY
    if _is_section(annotation):
        return _build_partly(annotation, value, faulty)
    row = (get_args(annotation) or (None,))[0]
    if _is_section(row):
        rows = tuple(_build_value(row, item, _below(faulty, i)) for i, item in enumerate(value))
        return _FAULTY if any(item is _FAULTY for item in rows) else rows
    if faulty:
        return _FAULTY
    return tuple(value) if isinstance(value, list) else value


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _below(locations: Sequence[Location], part: int | str) -> list[Location]:
    return [location[1:] for location in locations if location[:1] == (part,)]
