"""The base of all config sections: strict frozen pydantic models, with checks between fields. Imports pydantic only.

A field is checked by its type. What must hold between fields is a method marked with `check`. A check is skipped only if
it reads a faulty field, so one mistake never hides another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

Check = TypeVar("Check", bound=Callable[[Any], Iterator[str]])


class FaultyFieldError(Exception):
    """A check read a field whose value is faulty. See `mae_et.config.validation.from_dict`."""


class Section(BaseModel):
    """A part of a config. Fields are strict: an int is accepted for a float, a list for a tuple, nothing else is converted."""

    # Folder of the shipped configs of this class, for a whole config.
    folder: ClassVar[str] = ""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_private_keys(cls, values: Any) -> Any:
        """Drops keys that begin with "_": they are the config file's own variables."""
        if isinstance(values, Mapping):
            return {key: value for key, value in values.items() if not str(key).startswith("_")}
        return values

    def __getattr__(self, name: str) -> Any:
        """Raises FaultyFieldError for a field that has no value. Only partly built sections, made for checks, lack one."""
        if name in type(self).model_fields:
            raise FaultyFieldError(name)
        return super().__getattr__(name)  # type: ignore[misc]

    @classmethod
    def other_kind(cls, values: Mapping[str, Any]) -> str | None:
        """Returns a message if the values clearly belong to another kind of config; None otherwise."""
        return None


def check(method: Check) -> Check:
    """Marks a method of a Section that yields one message for each fault between its fields."""
    method.is_check = True  # type: ignore[attr-defined]
    return method


def check_faults(section: Section, prefix: str = "") -> Iterator[str]:
    """Runs the checks of a section and of the sections inside it.

    Args:
        section: may be partly built; reading a missing field skips the check that reads it.
        prefix: dotted path of the section, ending with ".", or "".
    Yields:
        The faults, with the prefix.
    """
    names = dict.fromkeys(
        name
        for base in reversed(type(section).__mro__)
        for name, member in vars(base).items()
        if getattr(member, "is_check", False)
    )
    for name in names:
        try:
            for fault in getattr(section, name)():
                yield prefix + fault
        except FaultyFieldError:
            continue
    for name in type(section).model_fields:
        value = vars(section).get(name)
        if isinstance(value, Section):
            yield from check_faults(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if isinstance(item, Section):
                    yield from check_faults(item, f"{prefix}{name}[{i}].")


def unused(section: Section, names: Iterable[str], reason: str, prefix: str = "") -> Iterator[str]:
    """Yields a fault for each field that differs from its default although it has no effect.

    Args:
        section: that has the fields.
        names: of the fields; a nested section stands for all its fields.
        reason: why they have no effect, e.g. "optimizer.name = 'adamw'".
        prefix: dotted path from the section that reports the fault, ending with ".", or "".
    """
    for name in names:
        default = type(section).model_fields[name].get_default(call_default_factory=True)
        try:
            value = getattr(section, name)
        except FaultyFieldError:
            continue
        if isinstance(value, Section):
            yield from unused(value, type(value).model_fields, reason, f"{prefix}{name}.")
        elif value != default:
            rows = isinstance(value, tuple) and any(isinstance(item, Section) for item in value)
            shown = f"[{len(value)} rows]" if rows else repr(list(value) if isinstance(value, tuple) else value)
            default = list(default) if isinstance(default, tuple) else default
            yield f"{prefix}{name} = {shown} has no effect with {reason}: remove it, or set its default, {default!r}"
