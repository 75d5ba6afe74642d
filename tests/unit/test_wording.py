"""tools/check_wording.py: what `make check` finds in texts."""

import pytest

from tests.conftest import load_tool


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nis told here", 2),
        ("It goes on.", 1),
        ("# it goes\n# on with it", 1),
        ('"is no "\n    "multiple of 8"', 1),
        ("Whatever it is", 1),
        ("what the file says of its origin", 1),
        ("read as it lies", 1),
        ("mended", 1),
    ],
)
def test_avoided_words__are_found_across_lines(text, line):
    (found,) = load_tool("check_wording").avoided_words(text)
    assert found.startswith(f"{line}: ")
    assert "write:" in found


@pytest.mark.parametrize("text", ["recommend", "ongoing", "toldo", "a multiple of", "go one step", "there is no file"])
def test_avoided_words__other_words_pass(text):
    assert list(load_tool("check_wording").avoided_words(text)) == []
