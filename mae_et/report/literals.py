"""Reads the values of a run's config file without running it: a report must not execute what lies in a stranger's folder."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

MOST_BYTES = 2**20


def read_literals(path: Path) -> dict[str, Any]:
    """Reads the assignments of a config file as mae_et and mmengine write it: literals, and dict(key=value).

    Args:
        path: a Python file.
    Returns:
        Values by name; what is computed is left out.
    Raises:
        ValueError: if the file is no such text.
        OSError: if it cannot be read.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError("larger than a config")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"no Python literals: {type(error).__name__}") from error
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = _value(node.value)
            except (ValueError, TypeError, RecursionError):
                continue
    return values


def _value(node: ast.expr) -> Any:
    """Evaluates a literal, where dict(a=1) is one."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        pairs: dict[Any, Any] = {}
        for keyword in node.keywords:
            pairs.update({keyword.arg: _value(keyword.value)} if keyword.arg else _value(keyword.value))
        return pairs
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _value(key) for key in node.keys]
        return dict(zip(keys, (_value(value) for value in node.values), strict=True))
    return ast.literal_eval(node)
