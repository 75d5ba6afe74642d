"""Names of tar shards: brace and glob patterns to paths, and back."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

import braceexpand

from mae_et.data.sources.listing import nearest_folder
from mae_et.errors import DataError, printable

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_NUM_LISTED = 20  # missing shards in a message


def is_shard_name(path: str) -> bool:
    """Whether a path ends as a shard does."""
    return path.lower().endswith(SHARD_SUFFIXES)


def expand_shards(pattern: str, max_shards: int) -> list[Path]:
    """Returns the files that a brace or glob pattern names, in its order.

    Args:
        pattern: e.g. `train-{000000..000004}.tar` or `train-*.tar`.
        max_shards: limit for the number of names; checked before they are made.
    Raises:
        DataError: if the pattern is not valid, names too many shards, or a shard is missing.
    """
    shown = printable(pattern[:200])
    if os.path.isfile(pattern):
        return [Path(pattern)]
    names = expand_names(pattern, max_shards)
    paths: list[Path] = []
    missing: list[str] = []
    for name in names:
        if os.path.isfile(name):
            paths.append(Path(name))
        elif glob.has_magic(name):
            matches = [Path(path) for path in sorted(glob.glob(name, recursive=True)) if is_shard_name(path)]
            files = [path for path in matches if path.is_file()]
            paths += files
            missing += [] if files else [name]
            if len(paths) > max_shards:
                raise too_many(shown, len(paths), max_shards)
        else:
            missing.append(name)
    if not paths:
        raise DataError(f"{shown} matches no tar shard; {nearest_folder(Path(names[0]))}")
    if missing:
        listed = [f"  - {printable(name)}" for name in missing[:_NUM_LISTED]]
        if len(missing) > _NUM_LISTED:
            listed.append(f"  - and {len(missing) - _NUM_LISTED} more")
        raise DataError(
            f"{shown}: {len(missing)} of {len(names)} shards are missing; download them or narrow the pattern\n"
            + "\n".join(listed)
        )
    return paths


def expand_names(pattern: str, max_shards: int) -> list[str]:
    """Returns the names that a brace pattern stands for; arguments and errors as for `expand_shards`."""
    shown = printable(pattern[:200])
    try:
        num_names = _num_names(pattern)
        if num_names > max_shards:
            raise too_many(shown, num_names, max_shards)
        return list(braceexpand.braceexpand(pattern, escape=False))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{shown} is not a valid brace pattern ({error}); write for example train-{{000000..000004}}.tar"
        ) from error


def patterns_for(paths: Iterable[str]) -> list[str]:
    """Returns the brace patterns that together name the given shards."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    singles: list[str] = []
    for path in paths:
        match = re.fullmatch(r"(.*?)(\d+)(\.tar|\.tar\.gz|\.tgz)", path, re.DOTALL)
        if match:
            groups.setdefault((match[1], match[3], len(match[2])), []).append(match[2])
        else:
            singles.append(path)
    for (prefix, suffix, _), numbers in groups.items():
        low, high = min(numbers), max(numbers)
        if len(numbers) == 1:
            singles.append(f"{prefix}{low}{suffix}")
        elif int(high) - int(low) + 1 == len(numbers):
            singles.append(f"{prefix}{{{low}..{high}}}{suffix}")
        else:
            singles.append(f"{prefix}*{suffix}")
    return sorted(singles)


def too_many(shown: str, num_names: int, max_shards: int) -> DataError:
    """Returns the error of a pattern with too many names."""
    digits = str(num_names) if num_names < 10**12 else "more than 10^12"
    return DataError(
        f"{shown} names {digits} shards, above the limit of {max_shards}; correct the pattern or raise data.max_shards"
    )


def _num_names(pattern: str) -> int:
    """Returns the number of names that a brace pattern stands for, without making them."""
    total, depth, start = 1, 0, 0
    for position, character in enumerate(pattern):
        if character == "{":
            if depth == 0:
                start = position + 1
            depth += 1
        elif character == "}" and depth:
            depth -= 1
            if depth == 0:
                total *= _num_choices(pattern[start:position])
    return total


def _num_choices(expression: str) -> int:
    if match := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", expression):
        low, high, step = int(match[1]), int(match[2]), int(match[3] or 1) or 1
        return abs(high - low) // step + 1
    if match := re.fullmatch(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?", expression):
        low, high = (braceexpand.alphabet.index(match[part]) for part in (1, 2))
        return abs(high - low) // (int(match[3] or 1) or 1) + 1
    parts, depth, start = [], 0, 0
    for position, character in enumerate(f"{expression},"):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(expression[start:position])
            start = position + 1
    return sum(map(_num_names, parts))
