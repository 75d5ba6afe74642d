"""Lists of data sources as text: `[/data/a, /data/b]`. Everything that takes the name of a source takes a list, too."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from contextlib import suppress

# Commas within braces, and those before an option such as `,seed=3`, belong to a source.
_SEPARATOR = re.compile(r",(?![^{]*\})(?!\s*\w+=)")


def join_sources(value: object) -> object:
    """Returns a list of source names as text; any other value unchanged, for pydantic to check."""
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return json.dumps(list(value), ensure_ascii=False)
    return value


def split_sources(spec: str | Sequence[str]) -> list[str]:
    """Returns the sources that a text names: the items of `[A, B]`, otherwise the text itself.

    Args:
        spec: the items may be quoted as in Python. Without quotes they are separated by commas.
    """
    if not isinstance(spec, str):
        return list(spec)
    if not is_list(spec):
        return [spec]
    with suppress(ValueError, SyntaxError):
        items = ast.literal_eval(spec.strip())
        if all(isinstance(item, str) for item in items):
            return items
    return [item for item in map(str.strip, _SEPARATOR.split(spec.strip()[1:-1])) if item]


def is_list(spec: str) -> bool:
    """Whether a text names a list of sources. A single folder of such a name is written as `./[name]`."""
    spec = spec.strip()
    return spec.startswith("[") and spec.endswith("]")
