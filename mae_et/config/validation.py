"""Nested dicts -> frozen dataclasses, with all faults reported at once. Standard library only.

A dataclass may have `faults()`, which yields what is wrong between its fields; `Annotated[int, Range(ge=1)]` bounds one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Bounds of a number: ge <= x <= le, gt < x < lt."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def fault(self, value: float) -> str | None:
        """Returns what is wrong with value, or None."""
        inside = (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )
        if inside and math.isfinite(value):
            return None
        signs = ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt))
        return "must be " + " and ".join(f"{sign} {bound:g}" for sign, bound in signs if bound is not None)


def build(cls: type, values: Any, faults: list[str]) -> Any:
    """Builds a dataclass from nested mappings, adding one line to `faults` for each thing that is wrong."""
    return _build(cls, values, "", faults, set())


def plain(value: Any) -> Any:
    """Returns the value with tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys and their values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _build(cls: type, values: Any, prefix: str, faults: list[str], defaulted: set[str]) -> Any:
    name = prefix.rstrip(".") or "the config"
    if not isinstance(values, Mapping):
        faults.append(f"{name} = {values!r} must be a dict")
        return None
    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    built = {}
    for key, value in values.items():
        if key in fields:
            num_before = len(faults)
            converted = _convert(hints[key], value, prefix + key, faults, defaulted)
            # A faulty value gives way to its default, so that the checks below still run; a nested config did so inside.
            if len(faults) == num_before or _holds_configs(converted):
                built[key] = converted
            else:
                defaulted.add(key)
        elif not str(key).startswith("_"):
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(fields)}"
            faults.append(f"unknown key {prefix}{key}; {hint}")
    required = [
        key
        for key, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    faults.extend(f"{prefix}{key} is missing" for key in required if key not in values)
    if any(key not in built for key in required):
        return None
    config = cls(**built)
    if hasattr(config, "faults"):
        # What is wrong with a default that nobody asked for is no fault of the user's.
        known = [fault for fault in config.faults() if not defaulted & set(re.findall(r"\w+", fault))]
        faults.extend(prefix + fault for fault in known)
    return config


def _holds_configs(value: Any) -> bool:
    items = value if isinstance(value, tuple) else (value,)
    return all(dataclasses.is_dataclass(item) for item in items)


def _convert(hint: Any, value: Any, name: str, faults: list[str], defaulted: set[str]) -> Any:
    """Checks value against a type hint, converting lists to tuples, ints to floats and dicts to dataclasses."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name + ".", faults, defaulted)  # type: ignore[arg-type]
    if origin is Annotated:
        value = _convert(args[0], value, name, faults, defaulted)
        fault = args[1].fault(value) if isinstance(value, (int, float)) else None
        if fault:
            faults.append(f"{name} = {value!r} {fault}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [arg for arg in args if arg is not type(None)]  # the configs use `X | None` only
        return _convert(inner, value, name, faults, defaulted)
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            near = difflib.get_close_matches(str(value), [str(arg) for arg in args], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            faults.append(f"{name} = {value!r} must be one of {', '.join(map(repr, args))}{hint}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            faults.append(f"{name} = {value!r} must be a list")
            return value
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(hints) != len(value):
            faults.append(f"{name} = {value!r} must have {len(hints)} values")
            return value
        return tuple(
            _convert(h, v, f"{name}[{i}]", faults, defaulted) for i, (h, v) in enumerate(zip(hints, value, strict=True))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        faults.append(f"{name} = {value!r} must be {'an int' if hint is int else f'a {hint.__name__}'}")
    return value
