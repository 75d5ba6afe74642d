"""The notebook of the tutorials runs from its first cell to its last, on a small budget."""

from __future__ import annotations

import os

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import REPOSITORY
from tests.docs.pages import DOCS

NOTEBOOK = DOCS / "tutorials" / "your_images.ipynb"
SMALL = {"NUM_IMAGES = 400": "NUM_IMAGES = 40", "EPOCHS = 10": "EPOCHS = 3"}


def test_notebook__is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [
        cell for cell in notebook.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)
    ] == []


@pytest.mark.skipif(not (REPOSITORY / "mae_et" / "api.py").is_file(), reason="needs mae_et.pretrain and others")
def test_notebook__runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    for full, small in SMALL.items():
        assert full in parameters.source
        parameters.source = parameters.source.replace(full, small)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "work_dirs" / "notebook" / "run" / "backbone.safetensors").is_file()
    for name in ("pca/pictures", "attention/pictures", "neighbours/neighbours.html"):
        assert (tmp_path / "work_dirs/notebook" / name).exists()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "images shown" in text
    assert "untrained: " in text
