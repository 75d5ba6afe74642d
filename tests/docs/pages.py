"""Reads the Markdown pages of the repository: blocks, commands, links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "sh", "console")
PROGRAMS = ("python", "torchrun", "make", "pip", "mae-et", "export", ".")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A shell command of a page."""

    where: str
    words: tuple[str, ...]


def blocks(page: Path) -> Iterator[Block]:
    """Yields the fenced blocks of a page, without their indentation."""
    for indent, language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        lines = [line.removeprefix(indent) for line in text.splitlines()]
        yield Block(page, language, "\n".join(lines))


def is_shell(block: Block) -> bool:
    """Whether a block holds commands; one without a language does if its lines begin with a known command."""
    first = [line.split()[0] for line in block.text.splitlines() if line.strip() and not line.startswith((" ", "#"))]
    return block.language in SHELL or (not block.language and bool(first) and first[0] in PROGRAMS)


def commands(text: str, where: str) -> Iterator[Command]:
    """Yields the commands of a shell text: lines are joined; comments, prompts, VARIABLE=value and a last "&" go."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z0-9_]+=.*", words[0]):
            words.pop(0)
        if words[-1:] == ["&"]:
            words.pop()
        if words:
            yield Command(where, tuple(words))


def page_commands(page: Path) -> list[Command]:
    """Returns all commands of a page, in order."""
    where = str(page.relative_to(REPOSITORY))
    return [command for block in blocks(page) if is_shell(block) for command in commands(block.text, where)]


def prose(page: Path) -> str:
    """Returns a page without its fenced blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """Returns the anchors of the headings of a page, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
