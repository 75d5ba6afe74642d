"""A griffe extension: puts a blank line before each section of a docstring. Its parser needs it, our docstrings have none."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"(?<=\n)(?=(?:Args|Attributes|Returns|Yields|Raises|Source):)")


class BlankLines(griffe.Extension):
    """Changes the docstrings of all modules, classes and functions before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub("\n", obj.docstring.value)
