"""Pictures of images that are not 8-bit RGB in `mae-et show` and `mae-et predict`, and UMAP."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_et.data.arrays import decode
from mae_et.data.decoding import Decoding
from mae_et.errors import UserError
from mae_et.evaluation.drawing import Drawing
from mae_et.models.timm_backbone import create_backbone
from mae_et.models.vit import random_vit
from mae_et.storage.backbone import write_backbone, write_safetensors
from mae_et.tasks.viewer import ShowOptions, Viewer, open_labelled
from tests.conftest import load_tool

tifffile = pytest.importorskip("tifffile")

RANGE = "[0, 10000]"
DATA = {"mean": "[0.1, 0.1, 0.1, 0.1, 0.2]", "std": "[0.05, 0.05, 0.05, 0.05, 0.05]", "value_range": RANGE}
COMMON = ["--device", "cpu", "--num-workers", 0]


def run(tool: str, *words: object) -> None:
    script = load_tool(tool)
    script.main(script.make_parser().parse_args([*map(str, (*words, *COMMON))]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a ViT of five channels, and 5-band 16-bit TIFF files in a folder for each of two classes."""
    folder = tmp_path_factory.mktemp("bands")
    torch.manual_seed(0)
    vit = random_vit(32, patch_size=8, embed_dim=24, depth=1, num_heads=3, in_chans=5)
    write_backbone(vit.state_dict(), folder / "vit.safetensors", "timm", {"num_heads": "3", "image_size": "32", **DATA})
    rng = np.random.default_rng(0)
    for label, band in (("field", 0), ("water", 4)):
        (folder / "tiles" / label).mkdir(parents=True)
        for i in range(6):
            values = rng.normal(1000, 100, (40, 44, 5)).clip(0)
            values[8:32, 8:32, band] += 700
            path = folder / "tiles" / label / f"{i}.tif"
            tifffile.imwrite(path, values.astype(np.uint16), photometric="minisblack", planarconfig="contig")
    return folder


def test_drawing__channels_and_contrast(folder: Path) -> None:
    path = folder / "tiles/water/0.tif"
    array = decode(path, Decoding(5, (0, 10000), dtype="float32"))
    drawing = Drawing([0.1] * 4 + [0.2], [0.05] * 5, True, (4, 2, 0))
    image = drawing.image(array)
    values = tifffile.imread(path)[..., [4, 2, 0]] / 10000
    black = np.array([0.1, 0, 0])  # mean - 2 std
    np.testing.assert_allclose(np.asarray(image) / 255, ((values - black) / 0.2).clip(0, 1), atol=0.6 / 255)
    assert drawing.note.startswith("Channels 4, 2, 0 of 5, counted from 0. Black is mean - 2 std")
    rgb = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    plain = Drawing([0.5] * 3, [0.2] * 3, False)
    assert plain.image(rgb) is rgb
    assert plain.note == ""
    np.testing.assert_array_equal(
        np.asarray(Drawing([0.5] * 3, [0.2] * 3, False, [1]).image(rgb)), np.asarray(rgb)[..., 1]
    )
    for channels in ((0, 5, 1), (0, 1), (-1,), ()):
        with pytest.raises(UserError, match="must be one or three numbers from 0 to 4"):
            Drawing([0.1] * 5, [0.05] * 5, True, channels)


def test_show__five_bands(folder: Path, tmp_path: Path) -> None:
    vit, tiles = folder / "vit.safetensors", folder / "tiles"
    viewer = Viewer(str(vit), ShowOptions(num_workers=0, device="cpu", channels=(4, 0, 1)))
    _, places, pictures = viewer.look(open_labelled([str(tiles)], viewer), viewer.embedding)
    assert pictures.shape == (12, 3, 32, 32)
    bright = pictures[:, :, 12:20, 12:20].mean(dim=(2, 3))
    for place, (water, field, other) in zip(places, bright.tolist(), strict=True):
        assert (water > 0.3) == (place >= 6), "band 4, with its own mean, is bright for water"
        assert (field > 0.75) == (place < 6)
        assert other < 0.75
    run("show", "pca", vit, tiles, "--out", tmp_path / "pca", "--channels", 4, 0, 1)
    with Image.open(tmp_path / "pca/pictures/000.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 20
    assert json.loads((tmp_path / "pca/show.json").read_text())["channels"] == [4, 0, 1]
    run("show", "similarity", vit, tiles / "field", "--out", tmp_path / "grey", "--patch", 1, 1, "--channels", 0)
    query = tiles / "water/0.tif"
    run("show", "neighbours", vit, query, "--folder", tiles, "--out", tmp_path / "near", "--k", 3)
    page = (tmp_path / "near/neighbours.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4
    assert "Channels 0, 1, 2 of 5" in page
    with pytest.raises(UserError, match="channels \\[5\\] must be one or three"):
        run("show", "pca", vit, tiles, "--out", tmp_path / "x", "--channels", 5)


def test_predict__grey_of_16_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    model = create_backbone("resnet18", 32, num_classes=2, in_chans=1, **options)
    metadata: dict[str, Any] = {
        "objective": "supervised", "architecture": "resnet18", "model_options": json.dumps(options), "in_chans": "1",
        "image_size": "32", "eval_crop_ratio": "1.0", "class_names": '["a", "b"]', "mean": "[0.5]", "std": "[0.125]",
        "value_range": "[0, 4000]",
    }  # fmt: skip
    write_safetensors(model.state_dict(), tmp_path / "c.safetensors", metadata)
    values = np.linspace(1000, 3000, 400).reshape(1, -1).repeat(400, 0).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "ramp.png")
    words = [tmp_path / "c.safetensors", tmp_path / "ramp.png", "--out", tmp_path / "out"]
    run("predict", *words, "--pictures")
    with Image.open(next((tmp_path / "out/pictures").glob("*.png"))) as picture:
        row = np.asarray(picture.convert("L"))[200, 5:395].astype(int)
    assert row[0] < 10, "1000 is black: mean - 2 std"
    assert row[-1] > 245
    assert (np.diff(row) >= -1).all()
    for extra, message in (
        (("--pictures", "--channels", 1), "must be one or three numbers from 0 to 0"),
        (("--channels", 0), r"channels = \[0\] has no effect without pictures"),
    ):
        with pytest.raises(UserError, match=message):
            run("predict", *words, "--overwrite", *extra)


def test_umap__coordinates_by_label(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # compiling takes ten times as long as this little work
    pytest.importorskip("umap", reason="needs umap-learn: requirements-dev.txt")
    found = []
    for name in ("one", "two"):
        run("show", "umap", folder / "vit.safetensors", folder / "tiles", "--out", tmp_path / name, "--seed", 3)
        with open(tmp_path / name / "umap.csv", newline="") as file:
            found.append(list(csv.DictReader(file)))
    assert found[0] == found[1], "a seed gives the same coordinates"
    assert [row["label"] for row in found[0]] == ["field"] * 6 + ["water"] * 6
    points = np.array([[float(row["x"]), float(row["y"])] for row in found[0]])
    assert np.isfinite(points).all()
    assert points.std() > 0
    with Image.open(tmp_path / "one/umap.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    with pytest.raises(UserError, match="6 images are too few for UMAP: give 10 or more"):
        run("show", "umap", folder / "vit.safetensors", folder / "tiles/field", "--out", tmp_path / "few")


def test_umap__without_the_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mae_et\[umap\]'"):
        run("show", "umap", folder / "vit.safetensors", folder / "tiles", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
