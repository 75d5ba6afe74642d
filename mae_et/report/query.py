"""Turns runs into one pandas table of facts, and selects runs from it by a query."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from difflib import get_close_matches

import pandas as pd

from mae_et.errors import UserError
from mae_et.report.facts import FACTS, fact
from mae_et.report.scan import Run

MAX_QUERY = 1000  # characters
ALLOWED = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.Eq, ast.NotEq, ast.Lt,
    ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple,
)  # fmt: skip


def make_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Returns a row for each run and a column for each of `FACTS`, NaN or None where unknown."""
    frame = pd.DataFrame([{name: fact(run, name) for name in FACTS} for run in runs], columns=list(FACTS))
    for name in FACTS:
        if not frame[name].map(lambda value: isinstance(value, str)).any():
            frame[name] = pd.to_numeric(frame[name])  # a column without any value compares as NaN
    return frame


def select(runs: Sequence[Run], query: str) -> set[Run]:
    """Returns the runs that a pandas query keeps.

    Args:
        query: comparisons of the columns with constants, joined by and, or, not. Calls, attributes and variables are
            refused, because pandas would run them.
    Raises:
        UserError: if the query is refused or cannot be evaluated.
    """
    check_query(query)
    frame = make_frame(runs)
    try:
        mask = frame.eval(query.strip(), engine="python")
    except Exception as error:  # pandas raises many types: operands of different types, deep nesting
        raise UserError(_query_message(query, f"{type(error).__name__}: {str(error)[:200]}")) from error
    if not isinstance(mask, pd.Series) or mask.dtype != bool:
        raise UserError(_query_message(query, "not a comparison of a column"))
    return {run for run, is_kept in zip(runs, mask, strict=True) if is_kept}


def check_query(query: str) -> None:
    """Raises a UserError, with the columns, unless the query consists of comparisons of columns and constants."""
    try:
        if len(query) > MAX_QUERY:
            raise SyntaxError(f"longer than {MAX_QUERY} characters")
        tree = ast.parse(query.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        said = error.msg if isinstance(error, SyntaxError) else type(error).__name__
        raise UserError(_query_message(query, f"not an expression ({said})")) from error
    for node in ast.walk(tree):
        if not isinstance(node, ALLOWED):
            raise UserError(_query_message(query, f"{type(node).__name__} is not allowed"))
        if isinstance(node, ast.Constant) and not isinstance(node.value, (str, int, float)):
            raise UserError(_query_message(query, f"{node.value!r} is not a text or a number"))
    check_columns([node.id for node in ast.walk(tree) if isinstance(node, ast.Name)], f"--query {query!r}")


def _query_message(query: str, fault: str) -> str:
    return (
        f"--query {query[:200]!r}: {fault}. Compare columns with texts or numbers, joined by and, or, not, in; for "
        f"example \"kind == 'pretrain' and equivalent_epochs > 10\". Columns: {', '.join(FACTS)}"
    )


def check_columns(names: Sequence[str], option: str) -> None:
    """Raises a UserError if a name is not a column."""
    for name in names:
        if name not in FACTS:
            near = get_close_matches(name, FACTS, 3)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            raise UserError(f"{option}: there is no column {name!r}; {hint}columns: {', '.join(FACTS)}")
