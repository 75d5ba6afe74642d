"""Links of the pages lead somewhere: files and anchors. External addresses are not fetched."""

from __future__ import annotations

import re

import pytest

from tests.conftest import REPOSITORY
from tests.docs.pages import DOCS, PAGES, TEXTS, anchors, prose

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
ALL = [
    *TEXTS,
    REPOSITORY / "CHANGELOG.md",
    REPOSITORY / "benchmarks" / "README.md",
    *REPOSITORY.glob("results/*/README.md"),
]


def broken_links(page):
    """Yields each link of a page that leads nowhere."""
    for markdown, html in LINK.findall(prose(page)):
        target, _, anchor = (markdown or html).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists():
            yield f"{target} does not exist"
        elif anchor and anchor not in anchors(path):
            yield f"{target}#{anchor}: no such heading"


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links__lead_somewhere(page):
    assert list(broken_links(page)) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](absent.md)", "absent.md does not exist"),
        ("[a](other.md#nowhere)", "other.md#nowhere: no such heading"),
        ("[a](#nowhere)", "#nowhere: no such heading"),
        ('<img src="absent.png">', "absent.png does not exist"),
        ("[a](other.md#some-heading--more) [b](https://example.org) `[c](absent.md)`", None),
    ],
)
def test_links__broken_ones_are_found(tmp_path, text, fault):
    (tmp_path / "other.md").write_text("# Some heading: `x` & more\n".replace("`x` ", ""))
    (tmp_path / "page.md").write_text(text)
    assert list(broken_links(tmp_path / "page.md")) == ([] if fault is None else [fault])


def test_pages__are_reached_from_the_index():
    """Each page is named in docs/index.md, which gives the reading order, and in the navigation of the site."""
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    navigation = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    names = [page.relative_to(DOCS).as_posix() for page in PAGES if page.name != "index.md"]
    assert [name for name in names if f"({name})" not in index or f": {name}\n" not in navigation] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_pages__begin_with_purpose_and_readers(page):
    heading, paragraph = page.read_text(encoding="utf-8").split("\n\n")[:2]
    assert heading.startswith("# ")
    assert re.match(r"This (page|guide|tutorial) \w+", paragraph)
    assert re.search(r"\b(is for|for (every|users|readers|developers|runs))", paragraph)
