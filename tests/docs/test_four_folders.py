"""The guide of the four folders runs as printed on small folders: GeoTIFF of five bands, DICOM, grey microscopy, road scenes."""

from __future__ import annotations

import json
import re
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_et.runs.record_files import read_summary
from tests.conftest import REPOSITORY
from tests.docs.pages import DOCS, blocks, page_commands
from tests.docs.test_commands import parse
from tests.downstream.conftest import needs_mm
from tests.unit.test_arrays import dicom

tifffile = pytest.importorskip("tifffile")
PAGE = DOCS / "guides" / "four_folders.md"
GEO_TAGS = [
    (33550, "d", 3, (10.0, 10.0, 0.0), True),  # ModelPixelScale: 10 m
    (33922, "d", 6, (0.0, 0.0, 0.0, 5e5, 5e6, 0.0), True),  # ModelTiepoint
]
# What makes the commands small. The road scenes keep their size.
MODEL = "model.embed_dim=48 model.depth=4 model.num_heads=3"
SQUARE = "data.image_size=64"
OPTIONS = {
    "pretrain": f"{MODEL} model.decoder_embed_dim=32 model.decoder_depth=1 model.decoder_num_heads=2 batch.global_batch_size=4 "
    "batch.micro_batch_size=4 curriculum.equivalent_epochs=2 curriculum.warmup_equivalent_epochs=0.2 run.num_pictures=1 "
    "run.precision=fp32 data.num_workers=0",
    "classify": f"{MODEL} knn.ks=[3] run.precision=fp32 data.num_workers=0",
    "plan": MODEL,
}
TRAIN = (
    "train_cfg.max_iters=1 train_cfg.val_interval=1 train_dataloader.batch_size=2 train_dataloader.num_workers=0 "
    "train_dataloader.persistent_workers=False val_dataloader.num_workers=0 val_dataloader.persistent_workers=False "
    "model.decode_head.channels=16 model.auxiliary_head.channels=16"
)
SMALLER = [
    ("embed_dim=384, depth=12, num_heads=6", "embed_dim=48, depth=4, num_heads=3"),
    ("out_indices=(3, 5, 7, 11)", "out_indices=(0, 1, 2, 3)"),
    ("img_size=(360, 480)", "img_size=(360, 480), out_indices=(0, 1, 2, 3)"),
    ("[384]", "[48]"),
    ("in_channels=384", "in_channels=48"),
    ("(192, 192)", "(64, 64)"),
]


def spots(shape: tuple[int, int], bright: bool, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns values in [0, 1] with a square on a bright or dim ground, and their mask: 1 for the ground, 2 for the square."""
    values, mask = (0.5 if bright else 0.1) + 0.02 * rng.random(shape), np.ones(shape, np.uint8)
    top, left = (int(rng.integers(0, side // 2)) for side in shape)
    inside = np.s_[top : top + shape[0] // 3, left : left + shape[1] // 3]
    values[inside] = 0.8
    mask[inside] = 2
    return values, mask


def write_image(path: Path, kind: str, values: np.ndarray) -> None:
    if kind == "tiles":
        bands = np.stack([10000 * values * part for part in (1, 0.9, 0.8, 0.7, 0.6)], axis=-1).astype(np.uint16)
        tifffile.imwrite(
            path.with_suffix(".tif"), bands, photometric="minisblack", planarconfig="contig", extratags=GEO_TAGS
        )
    elif kind == "ct":
        stored = (4095 * values).astype(np.int16)
        path.with_suffix(".dcm").write_bytes(dicom(stored, RescaleIntercept=-1024, RescaleSlope=1))
    elif kind == "cells":
        Image.fromarray((4095 * values).astype(np.uint16)).save(path.with_suffix(".png"))
    else:
        Image.fromarray((255 * values).astype(np.uint8)).convert("RGB").save(path.with_suffix(".jpg"), quality=95)


def write_folders(root: Path) -> None:
    """Writes the folders that the guide names, two classes in each; ct has no masks."""
    rng = np.random.default_rng(0)
    for kind in ("tiles", "ct", "cells", "road"):
        shape = (360, 480) if kind == "road" else (72, 80)
        for split, folder in (("train", "training"), ("val", "validation")):
            masks = root / f"{kind}_masks"
            for part in ("images", "annotations"):
                (masks / part / folder).mkdir(parents=True)
            for name in ("dim", "bright"):
                (root / kind / split / name).mkdir(parents=True)
                for i in range(2 if split == "val" else 4):
                    values, mask = spots(shape, name == "bright", rng)
                    write_image(root / kind / split / name / f"{i}", kind, values)
                    if kind != "ct":
                        write_image(masks / "images" / folder / f"{name}{i}", kind, values)
                        Image.fromarray(mask).save(masks / "annotations" / folder / f"{name}{i}.png")
            (masks / "classes.json").write_text(json.dumps({"classes": ["ground", "spot"]}))


@pytest.mark.mm
@needs_mm
def test_four_folders__run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path / "data")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "work_dirs").mkdir()
    monkeypatch.chdir(tmp_path)
    for block in blocks(PAGE):
        if block.language == "python":
            name = re.match(r'""".*: (work_dirs/\w+\.py)"""', block.text)
            assert name, "the first line of a config names its file"
            text = block.text.replace("/data/", f"{tmp_path}/data/")
            for printed, small in SMALLER:
                text = text.replace(printed, small)
            Path(name[1]).write_text(text)

    tools = {entry.name: entry for entry in entry_points(group="mae_et.commands")}
    seen: list[str] = []
    for command in page_commands(PAGE):
        program, name, *words = (word.replace("/data/", f"{tmp_path}/data/") for word in command.words)
        assert program == "mae-et"
        small = OPTIONS.get(name, "").split()
        if name in ("pretrain", "classify") and not any("image_size" in word for word in words):
            small.append(SQUARE)
        if name == "train":
            words, small = [*words, "--cfg-options"], TRAIN.split()
        if name == "predict":
            words = [word.replace("iter_80000", "iter_1") for word in words]
        tool = tools[name].load()
        tool.main(parse(tool.make_parser(), [*words, *small]))
        seen.append(name)
    assert [seen.count(name) for name in ("stats", "pretrain", "classify", "reconstruct", "train")] == [4, 4, 4, 4, 3]

    for kind in ("tiles", "ct", "cells", "road"):
        assert read_summary(tmp_path / "work_dirs" / f"{kind}_knn" / "summary.json").top1 == 1
        findings = json.loads((tmp_path / "work_dirs" / kind / "summary.json").read_text())["data_findings"]
        assert not findings["error"]
        assert list((tmp_path / "work_dirs" / kind / "pictures").glob("*.png"))
    for kind in ("tiles", "cells", "road"):
        assert 0 <= read_summary(tmp_path / "work_dirs" / f"{kind}_upernet" / "summary.json").metrics["mIoU"] <= 100
    masks = list((tmp_path / "work_dirs" / "road_masks" / "masks").rglob("*.png"))
    assert len(masks) == 4
    with Image.open(masks[0]) as mask:
        assert mask.size == (480, 360)
