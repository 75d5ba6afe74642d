"""The documentation builds without a warning, and its generated parts say what the code says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from mae_et.config.schema import ClassifyConfig, PretrainConfig, from_dict, resume_free, to_dict
from mae_et.config.supervised import SupervisedConfig
from mae_et.config.validation import flat
from mae_et.report.facts import FACTS
from mae_et.runs.records import PretrainSummary
from tests.conftest import REPOSITORY
from tests.unit.test_layers import MAY_IMPORT


def load(path: str):
    """Imports a script of docs/."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load("docs/hooks.py")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    # Not with --quiet, which drops warnings before --strict counts them.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout
    return out


def test_site__has_the_generated_parts(site):
    def text(name: str) -> str:
        return (site / "reference" / name).read_text(encoding="utf-8")

    assert "curriculum.baseline_equivalent_epochs" in text("config.html")
    assert "--fit-micro-batch" in text("command_line.html")
    assert "encoder_sha256" in text("records.html")
    assert "petaflops" in text("report_columns.html")
    assert "mae_et.tasks.run.TrainingTask" in text("api.html")
    assert "DenoisingTask" in (site / "guides" / "extending.html").read_text(encoding="utf-8")
    assert [page.name for page in site.rglob("*.html") if "&lt;!-- generate" in page.read_text(encoding="utf-8")] == []


def test_site__docstrings_have_sections(site):
    text = (site / "reference" / "api.html").read_text(encoding="utf-8")
    assert text.count("Raises:") > 5
    assert "<p>Returns:" not in text  # as a paragraph: the parser did not see the section


# -------------------------------------------------------------------- config keys


@pytest.mark.parametrize("cls", [PretrainConfig, ClassifyConfig, SupervisedConfig])
def test_config_rows__have_every_key_with_its_default(cls):
    values = {"data": {"train": "scenes:8"}}
    if cls is ClassifyConfig:
        values["data"]["val"] = "scenes:8"
    rows = {row[0]: row for row in hooks.config_rows(cls, resume_free("pretrain"))}
    defaults = dict(flat(to_dict(from_dict(cls, values))))
    assert set(rows) == set(defaults)
    for key in set(rows) - {"data.train", "data.val"}:
        assert rows[key][2] == hooks.code(defaults[key])
    assert all(row[3] for row in rows.values())  # each key has a meaning
    assert {key for key, row in rows.items() if row[4]} == set(rows) & resume_free("pretrain")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("data.image_size", "int >= 1, or list of int >= 1, 2 values"),
        ("data.max_image_pixels", "int >= 1 and <= 178,956,970"),
        ("model.mask_ratio", "float > 0 and < 1"),
        ("data.val", "str, or None"),
        ("data.loading", "`'exact'`, `'fast'`, `'direct'`"),
        ("optimizer.betas", "list of float >= 0 and < 1, 2 values"),
        ("replay.stages", "list of rows: `bandwidth`, `factor`, `size`"),
    ],
)
def test_type_text__is_plain(key, text):
    rows = {row[0]: row for row in hooks.config_rows(PretrainConfig, frozenset())}
    assert rows[key][1] == text


def test_config_part__classification_lists_only_what_differs():
    part = hooks.config_part("ClassifyConfig")
    assert "| regularization.mixup |" in part
    assert "| data.train |" not in part


# -------------------------------------------------------------------- other parts


def test_records_part__has_every_field_and_its_comment():
    part = hooks.records_part("PretrainSummary Environment")
    assert [name for name in PretrainSummary.model_fields if f"| `{name}` |" not in part] == []
    assert "| `peak_memory_mb` | float or None | of the main process, in 2^20 bytes |" in part


def test_columns_part__has_every_column():
    part = hooks.columns_part("")
    assert [name for name in FACTS if f"| `{name}` |" not in part] == []


def test_commands_part__has_every_tool():
    part = hooks.commands_part("")
    tools = [path.stem for path in hooks.tool_paths()]
    assert {"pretrain", "classify", "train", "report"} <= set(tools)
    assert [name for name in tools if f"usage: python tools/{name}.py" not in part] == []


def test_generated__unknown_part_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        hooks.generated("<!-- generate: nothing -->")


def test_unlinked__links_out_of_the_docs_become_text():
    folder = REPOSITORY / "docs" / "guides"
    markdown = (
        "[records](../../results/README.md), [README.md](../../README.md#x), [page](../index.md), [other](data.md)"
    )
    expected = "records (`results/README.md`), README.md, [page](../index.md), [other](data.md)"
    assert hooks.unlinked(markdown, folder) == expected


def test_rooms__picture_is_that_of_the_table(tmp_path):
    rooms = load("docs/explanation/rooms.py")
    rooms.main(tmp_path / "rooms.svg")
    assert (tmp_path / "rooms.svg").read_text() == (REPOSITORY / "docs" / "explanation" / "rooms.svg").read_text(), (
        "the table of imports has changed: run python docs/explanation/rooms.py"
    )
    shown = {room for row in rooms.levels(MAY_IMPORT) for room in row}
    assert shown == set(MAY_IMPORT) - rooms.LEFT_OUT


def test_levels__imports_go_down():
    levels = load("docs/explanation/rooms.py").levels(MAY_IMPORT)
    height = {room: level for level, row in enumerate(levels) for room in row}
    for room in height:
        assert all(height[below] < height[room] for below in MAY_IMPORT[room] if below in height)
