"""Lists words that the project's texts avoid: `python tools/check_wording.py`. A part of `make check`.

Comments, docstrings, messages and pages are in plain technical English. Exit codes: 0 nothing found; 1 found.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("mae_et", "downstream", "tools", "configs", "docs", "benchmarks", "results")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml")
SUFFIXES = {".py", ".md", ".j2", ".js"}

# Pattern -> what to write in its place.
AVOIDED = {
    "told": "say, report or record",
    "anew": "again",
    "mend(s|ed|ing)?": "fix",
    "(go|goes|went|going) on": "resume or continue",
    "whatever": "any, or the thing itself",
    "(is|are) no multiples? of": "is not a multiple of",
    "as (it lies|they lie)": "unchanged",
    r"what (\w+ ){1,3}says? of": "say that a method returns it or a file records it",
}
# Between two words there may be a line break, with the sign of a comment or the quotes of a string.
PATTERNS = {
    re.compile(r"\b" + words.replace(" ", r"[\s#\"']+") + r"\b", re.IGNORECASE): instead
    for words, instead in AVOIDED.items()
}


def avoided_words(text: str) -> Iterator[str]:
    """Yields "line: words; write ..." for each place."""
    for pattern, instead in PATTERNS.items():
        for match in pattern.finditer(text):
            yield f"{text.count(chr(10), 0, match.start()) + 1}: {' '.join(match[0].split())!r}; write: {instead}"


def main() -> int:
    files = [ROOT / page for page in PAGES]
    files += sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    num_found = 0
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if path == Path(__file__).resolve():
            continue
        for place in avoided_words(path.read_text(encoding="utf-8")):
            num_found += 1
            print(f"{name}:{place}")
    return 1 if num_found else 0


if __name__ == "__main__":
    sys.exit(main())
