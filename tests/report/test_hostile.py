"""Text of runs that would be markup, a formula or a script, in every form that the report takes."""

from __future__ import annotations

import csv
import io
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mae_et.report.join import make_benchmark
from mae_et.report.page import write_report
from mae_et.report.scan import read_literals
from mae_et.report.text import csv_text, markdown, markdown_table
from tests.report.folders import classify, dense, digest, pretrain, write

HOSTILE = {
    "script": "<script>window.stolen=1;alert(1)</script>",
    "close": "</script><script>window.stolen=2</script>",
    "style": "</style></svg><img src=x onerror=window.stolen=3>",
    "attribute": '" onmouseover="window.stolen=4" x=\'',
    "template": "{{ 7 * 7 }}{% raw %}",
    "math": "$\\frac{",
}


def hostile_runs(root: Path) -> Path:
    """Runs with markup in names, configs and metadata; folder names cannot hold a slash."""
    for i, (key, words) in enumerate(HOSTILE.items()):
        name = words.replace("/", "∕")
        pretrain(root / name, seed=i, data=f"data/{words}/train", seconds=10.0 + i)
        classify(root / f"knn{i}", name, 0.1 * i, seed=i, data=f"data/{words}")
        shown = {"curriculum": words, "architecture": words}
        folder = classify(root / f"ft{i}", words, 0.2, kind="finetune", seed=i, metadata=shown)
        config = (folder / "config.py").read_text()
        (folder / "config.py").write_text(config + f"note = dict(a={words!r})\n")
        summary = json.loads((folder / "summary.json").read_text())
        write(folder, summary={**summary, "notes": [words], "counts": {words: 3}})
        dense(root / f"seg{i}", "segmentation", {"mIoU": 1.0}, None, data=words)
        write(root / f"broken{i}", summary={"record_version": words, "kind": words})
        write(root / f"fault{i}", summary={**summary, words: 1, "top1": words})
        (folder.parent / key).mkdir()
    return root


class Tags(HTMLParser):
    """Collects what a browser would take for tags and handlers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "action")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    write_report(make_benchmark([hostile_runs(folder / "runs")]), folder / "out", title=HOSTILE["script"])
    return folder / "out"


def test_html__one_script_no_handler_no_foreign_link(written):
    text = (written / "report.html").read_text(encoding="utf-8")
    seen = Tags(text)
    assert seen.tags.count("script") == 1
    assert seen.tags.count("img") == 0
    assert seen.handlers == []
    assert all(link.startswith(("#", "data:text/csv", "data:,")) for link in seen.links)
    assert "49{%" not in text
    assert len(text) < 5_000_000


def test_svg__is_whole_xml(written):
    from xml.etree import ElementTree

    files = list((written / "figures").glob("*.svg"))
    assert len(files) > 5
    for path in files:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_markdown__holds_no_markup(written):
    text = (written / "report.md").read_text(encoding="utf-8")
    assert "<" not in text.replace("&lt;", "")
    assert "window.stolen" in text  # it is said, not hidden
    widths = {
        line.replace("\\|", "").count("|")
        for block in text.split("\n\n")
        if "run | kind" in block
        for line in block.splitlines()
        if line.startswith("|")
    }
    assert len(widths) == 1


def test_json__says_it_as_it_is(written):
    content = json.loads((written / "report.json").read_text(encoding="utf-8"))
    assert any(run["name"] == HOSTILE["math"] for run in content["runs"])


@pytest.mark.parametrize(
    "cell", ["=1+1", "+1", "-1+2", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", '=HYPERLINK("x")', "-x"]
)
def test_csv__no_cell_is_a_formula(cell):
    ((found,),) = list(csv.reader(io.StringIO(csv_text(["x"], [[cell]]), newline="")))[1:]
    assert found.startswith("'")
    assert found[1:] == cell.replace("\r", " ")


def test_csv__numbers_stay_numbers():
    text = csv_text(["a", "b", "c"], [[-1.5, None, 'say "x", y']])
    assert list(csv.reader(io.StringIO(text)))[1] == ["-1.5", "", 'say "x", y']


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b", "a\\|b"),
        ("<b>", "&lt;b>"),
        ("#12", "\\#12"),
        ("@team", "&#64;team"),
        ("two\nlines", "two lines"),
        ("a & b", "a &amp; b"),
        ("`x`", "\\`x\\`"),
        ("[a](b)", "\\[a\\](b)"),
        ("back\\slash", "back\\\\slash"),
        ("x_1 *y*", "x\\_1 \\*y\\*"),
    ],
)
def test_markdown__is_escaped(text, expected):
    assert markdown(text) == expected.replace(">", "\\>")


def test_markdown_table__cells_stay_cells():
    lines = markdown_table(["a", "b"], [["x|y", "1\n2"]], [True, False]).splitlines()
    assert lines == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 2 |"]


def test_pictures__are_embedded_small_and_faults_are_said(tmp_path):
    folder = pretrain(tmp_path / "runs" / "a")
    (folder / "reconstructions").mkdir()
    Image.effect_noise((3000, 2000), 60).convert("RGB").save(folder / "reconstructions" / "step_00000010.png")
    other = pretrain(tmp_path / "runs" / "b", seed=1, seconds=50.0)
    (other / "reconstructions").mkdir()
    (other / "reconstructions" / "step_00000010.png").write_bytes(b"no picture")
    write_report(make_benchmark([tmp_path / "runs"]), tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/webp") == 1
    assert 'width="1000" height="667"' in text
    assert "b: step_00000010.png cannot be read" in text
    assert len(text) < 5_000_000
    write_report(make_benchmark([tmp_path / "runs"]), tmp_path / "out", pictures=False)
    assert "data:image/webp" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_write_report__again_gives_the_same_page_and_drops_stale_files(tmp_path):
    pretrain(tmp_path / "runs" / "a")
    classify(tmp_path / "runs" / "knn", "a", 0.5)
    write_report(make_benchmark([tmp_path / "runs"]), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_bytes()
    write_report(make_benchmark([tmp_path / "runs"]), tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_bytes() == page
    assert "transfer_1.csv" in {path.name for path in (tmp_path / "out" / "tables").iterdir()}
    write_report(make_benchmark([tmp_path / "runs"], query="kind == 'pretrain'"), tmp_path / "out")
    assert "transfer_1.csv" not in {path.name for path in (tmp_path / "out" / "tables").iterdir()}
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = dict(b=-1.5, c=[1, (2, 3)], d=None)", {"a": {"b": -1.5, "c": [1, [2, 3]], "d": None}}),
        ("a = dict(**{'x y': 1}, b=2)\nb = open('x')\nc = 1 + 1", {"a": {"x y": 1, "b": 2}}),
        ("import os\nfor a in 'x': pass\na: int = 3\nb, c = 1, 2", {}),
        ("a = {'b': dict(c='d')}", {"a": {"b": {"c": "d"}}}),
        ("a = f'{1}'\nb = '''x'''", {"b": "x"}),
    ],
)
def test_read_literals__reads_and_never_runs(tmp_path, text, expected):
    (tmp_path / "config.py").write_text(text)
    assert read_literals(tmp_path / "config.py") == expected


@pytest.mark.parametrize("text", ["a = (", "\0", "a = " + "(" * 5000])
def test_read_literals__what_is_no_python_is_said(tmp_path, text):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(ValueError, match="not Python"):
        read_literals(tmp_path / "config.py")


ODD = ["0x" + "f" * 6000, "{1: 2}", "{b'a': 1, (1, 2): 3}", "{'a': {1, 2}}", "1j", "...", "[[[[]]]]", "'\\ud800'", "1e999",
       "{None: None}", "{**{1: 2}}", "dict(**{1: 2})", "b'x'", "True", "-5", "''", "dict(a=dict(b=dict()))"]  # fmt: skip


@pytest.mark.parametrize("value", ODD)
def test_config__odd_values_leave_the_report_whole(tmp_path, value):
    """Values that JSON, sorting or text encodings cannot take, in every place that the report reads."""
    places = {"data": ("train", "image_size"), "model": ("size", "target", "patch_size", "depth"), "run": ("seed",),
              "curriculum": ("preset", "equivalent_epochs"), "default_scope": (), "train_cfg": ("max_iters",)}  # fmt: skip
    for i, (part, keys) in enumerate(places.items()):
        for key in ("", *keys):
            folder = pretrain(tmp_path / "runs" / f"{part}_{key}", seed=i, seconds=20.0 + i, bands=[32])
            with open(folder / "config.py", "a") as file:
                file.write(f"{part} = dict({key}={value})\n" if key else f"{part} = {value}\n")
    write_report(make_benchmark([tmp_path / "runs"], query="seed == 0 or kind != 'x'"), tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()


def test_names__of_any_bytes(tmp_path):
    pretrain(tmp_path / "runs" / "a")
    os.rename(tmp_path / "runs" / "a", os.fsencode(tmp_path / "runs") + b"/\xff\xfe")
    write_report(make_benchmark([tmp_path / "runs"]), tmp_path / "out")
    assert "\\udcff\\udcfe" in (tmp_path / "out" / "tables" / "runs.csv").read_text(encoding="utf-8")


def test_digest__of_the_fixtures_tells_names_apart():
    assert digest("a_0") != digest("a_1")
