"""The dense probe on small generated scenes, on COCO instances, and on faulty masks."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_et.config.dense_probe import DenseProbeConfig
from mae_et.config.validation import from_dict
from mae_et.data.dense import IGNORE, open_split
from mae_et.data.scenes.files import write_ade20k, write_coco
from mae_et.errors import ConfigError, DataError, UserError
from mae_et.report.join import make_benchmark
from mae_et.report.tables import make_tables
from mae_et.runs.record_files import read_summary
from mae_et.runs.records import DenseProbeSummary
from mae_et.tasks.dense_probe import dense_probe

MODEL = {"size": "tiny", "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ade20k(tmp_path_factory.mktemp("scenes") / "ade", 12, 6, (48, 48), seed=1)


@pytest.fixture
def copy(scenes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scenes, tmp_path / "copy"))


def config_of(root: Path, **changes: Any) -> DenseProbeConfig:
    data = {"root": str(root), "image_size": 48, "num_workers": 0, **changes.pop("data", {})}
    values = {"data": data, "model": MODEL, "sweep": {"lrs": [0.03, 0.1]}, "run": {"precision": "fp32"}, **changes}
    return from_dict(DenseProbeConfig, values)


def test_dense_probe__scores_are_recorded_and_reported(scenes: Path, tmp_path: Path) -> None:
    summary = dense_probe(config_of(scenes), tmp_path / "runs" / "dense", device="cpu")
    assert isinstance(read_summary(tmp_path / "runs" / "dense" / "summary.json"), DenseProbeSummary)
    assert (summary["num_train"], summary["num_val"], summary["chosen"]["num_images"]) == (12, 6, 2)
    assert "of sweep.lrs: a better one may lie beyond" in summary["notes"][0]
    rows = list(csv.DictReader((tmp_path / "runs" / "dense" / "per_class.csv").open()))
    for name in ("linear", "knn"):
        for column, score in (("iou", "miou"), ("boundary_iou", "boundary_iou")):
            values = [float(row[f"{name}_{column}"]) for row in rows if row[f"{name}_{column}"]]
            assert np.mean(values) == pytest.approx(summary[name][score], abs=1e-4)
    # Colours alone tell the backgrounds apart: far better than the most frequent class everywhere.
    frequent = max(int(row["num_pixels"]) for row in rows) / sum(int(row["num_pixels"]) for row in rows)
    assert summary["linear"]["pixel_accuracy"] > 1.2 * frequent
    (table,) = [table for table in make_tables(make_benchmark([tmp_path / "runs"])) if table.section == "transfer"]
    assert "Dense probe" in table.title
    (row,) = table.rows
    assert row.values["linear_miou"].mean == pytest.approx(100 * summary["linear"]["miou"])
    assert row.values["knn_boundary_iou"].mean == pytest.approx(100 * summary["knn"]["boundary_iou"])
    with pytest.raises(UserError, match="finished run"):
        dense_probe(config_of(scenes), tmp_path / "runs" / "dense", device="cpu")


def test_open_split__coco_instances_are_drawn_by_category(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    root = write_coco(tmp_path / "coco", 3, 2, (48, 48), seed=1)
    masks = {"train_images": "train2017", "train_masks": "annotations/instances_train2017.json"}
    split = open_split(config_of(root, data=masks).data, "train")
    content = json.loads((root / masks["train_masks"]).read_text())
    assert split.class_names[0] == "background"
    ids = sorted(one["id"] for one in content["categories"])
    for pair in split.pairs:
        (number,) = [one["id"] for one in content["images"] if one["file_name"] == pair.image.name]
        own = [one for one in content["annotations"] if one["image_id"] == number]
        found = pair.mask.read()
        assert set(np.unique(found)) <= {0, *(1 + ids.index(one["category_id"]) for one in own)}
        smallest = min(own, key=lambda one: one["area"])
        area = (found == 1 + ids.index(smallest["category_id"])).sum()
        assert area >= 0.7 * smallest["area"]
    content["annotations"][0]["iscrowd"] = 1
    (root / masks["train_masks"]).write_text(json.dumps(content))
    assert any(
        (pair.mask.read() == IGNORE).any() for pair in open_split(config_of(root, data=masks).data, "train").pairs
    )


def _other_size(root: Path) -> None:
    path = sorted((root / "annotations/training").glob("*"))[0]
    Image.open(path).resize((20, 30), Image.Resampling.NEAREST).save(path)


def _other_value(root: Path) -> None:
    path = sorted((root / "annotations/validation").glob("*"))[0]
    Image.fromarray(np.full((48, 48), 200, np.uint8)).save(path)


def _colours(root: Path) -> None:
    path = sorted((root / "annotations/training").glob("*"))[0]
    Image.open(path).convert("RGB").save(path)


def _no_labels(root: Path) -> None:
    for path in (root / "annotations/training").glob("*"):
        Image.fromarray(np.zeros((48, 48), np.uint8)).save(path)


def _no_val_labels(root: Path) -> None:
    for path in (root / "annotations/validation").glob("*"):
        Image.fromarray(np.full((48, 48), 255, np.uint8)).save(path)


def _no_pairs(root: Path) -> None:
    for path in (root / "annotations/validation").glob("*"):
        path.rename(path.with_name(f"mask_{path.name}"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_size, r"1 of 12 masks have another size .* is 48 x 48 px \(H x W\), its mask 30 x 20 px"),
        (_other_value, "has the value 200, which the class list lacks"),
        (_colours, "has 3 channels, but a mask has one"),
        (_no_labels, r"leave 0 labelled patches, fewer than knn\.k = 30"),
        (_no_val_labels, "all pixels of the 6 validation masks are unlabelled"),
        (_no_pairs, "no image of .* has a mask in"),
    ],
)
def test_dense_probe__faulty_masks_are_refused(damage: Any, message: str, copy: Path, tmp_path: Path) -> None:
    damage(copy)
    with pytest.raises(DataError, match=message):
        dense_probe(config_of(copy, sweep={"lrs": [0.1], "epochs": 1}), tmp_path / "run", device="cpu")


def test_dense_probe__counts_what_it_leaves_out(copy: Path, tmp_path: Path) -> None:
    images, masks = (sorted((copy / kind / "training").glob("*")) for kind in ("images", "annotations"))
    images[0].write_bytes(b"no image")
    masks[1].write_bytes(b"no mask")
    masks[2].unlink()
    changes = {"sweep": {"lrs": [0.1], "epochs": 1}, "block": -1, "max_patches": 99, "data": {"image_size": [40, 56]}}
    summary = dense_probe(config_of(copy, **changes), tmp_path / "run", device="cpu")
    assert (summary["num_train"], summary["unreadable_train_images"], summary["num_patches"]) == (9, 2, 81)
    assert summary["counts"] == {"training_images_without_a_mask": 1}
    assert summary["chosen"]["accuracy"] is None
    with pytest.raises(ConfigError, match="block = 4 does not exist: the encoder has blocks 0 to 0"):
        dense_probe(config_of(copy, block=4), tmp_path / "other", device="cpu")


def test_dense_probe__real_photos(real_data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = {"image_size": 32, "max_train_images": 4, "max_val_images": 2}
    summary = dense_probe(
        config_of(real_data / "scene_mini", data=data, max_patches=300), tmp_path / "run", device="cpu"
    )
    assert summary["num_classes"] == 129
    assert 0 < summary["unlabelled_fraction"] < 0.5
    pytest.importorskip("pycocotools")
    coco = {
        **data, "train_images": "train2017", "train_masks": "annotations/instances_train2017.json",
        "val_images": "val2017", "val_masks": "annotations/instances_val2017.json",
    }  # fmt: skip
    summary = dense_probe(
        config_of(real_data / "coco_mini", data=coco, max_patches=300), tmp_path / "coco", device="cpu"
    )
    assert summary["num_classes"] == 81
