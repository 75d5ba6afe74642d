"""Data of users: images without objects, images smaller than a window, files that are broken or missing."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from downstream.checks.masks import inspect_masks
from mae_et.data.mask_files import pair_files, read_classes
from mae_et.data.scenes.files import write_ade20k
from mae_et.errors import DataError, UserError
from tests.downstream.conftest import needs_mm
from tests.downstream.runs import train, write_data

pytestmark = [pytest.mark.mm, needs_mm]
ONE = {"train_cfg__max_iters": 1, "train_cfg__val_interval": 1, "default_hooks__visualization__draw": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mm"))


@pytest.fixture
def own(data, tmp_path):
    """A copy to change."""
    shutil.copytree(data, tmp_path / "own")
    return tmp_path / "own"


def change_annotations(own, name, change):
    path = own / "coco" / "annotations" / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("part", ["some", "all"])
def test_detection__nothing_on_the_images(own, tmp_path, part):
    """Images without objects are kept with `filter_empty_gt=False`: some of a batch, or all of an epoch."""
    options = {
        **ONE,
        "train_dataloader__dataset__filter_cfg__filter_empty_gt": False,
        "train_dataloader__batch_size": 4,
    }

    def empty(content):
        kept = {image["id"] for image in content["images"][:2]} if part == "some" else set()
        content["annotations"] = [item for item in content["annotations"] if item["image_id"] in kept]

    change_annotations(own, "instances_train2017.json", empty)
    summary = train(own, "detection", tmp_path / "run", **options)
    assert math.isfinite(summary["last_loss"])
    assert summary["last_loss"] > 0


def test_detection__nothing_on_any_image_and_filtered(own, tmp_path):
    change_annotations(own, "instances_train2017.json", lambda content: content.update(annotations=[]))
    with pytest.raises(DataError, match="filter_empty_gt leaves no image"):
        train(own, "detection", tmp_path / "run", **ONE)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_images__smaller_than_a_window(data, tmp_path, task):
    """24 px are 3 patches; the windows have 8."""
    size = (24, 16)
    changes = {
        "train_dataloader__dataset__pipeline__2__scale": size,
        "val_dataloader__dataset__pipeline__1__scale": size,
    }
    if task == "segmentation":
        changes["model__data_preprocessor__size"] = (16, 24)
    summary = train(data, task, tmp_path, **ONE, **changes)
    assert math.isfinite(summary["last_loss"])


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_images__broken(own, tmp_path, task):
    folder = own / ("coco/train2017" if task == "detection" else "ade/images/training")
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"4 (images|files) cannot be read: .*\.jpg"):
        train(own, task, tmp_path / "run", **ONE)


@pytest.mark.parametrize(("task", "num_workers"), [("detection", 0), ("detection", 1), ("segmentation", 0)])
def test_images__broken_after_the_header(own, tmp_path, task, num_workers):
    """The inspection reads headers alone; the loader finds the rest."""
    folder = own / ("coco/train2017" if task == "detection" else "ade/images/training")
    for path in folder.iterdir():
        Image.new("RGB", (64, 64)).save(path, "BMP")
        path.write_bytes(path.read_bytes()[:54])
    with pytest.raises(DataError, match=r"cannot be read: .*\.jpg"):
        train(own, task, tmp_path / "run", **ONE, train_dataloader__num_workers=num_workers)


def test_images__missing(own, tmp_path):
    for path in (own / "coco/val2017").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"2 of 2 images are not in .*val2017"):
        train(own, "detection", tmp_path / "run", **ONE)


def test_segmentation__batch_of_one_under_batch_norm(data, tmp_path):
    with pytest.raises(UserError, match=r"train_dataloader\.batch_size"):
        train(data, "segmentation", tmp_path, **ONE, train_dataloader__batch_size=1)


PREFIX = {"img_path": "images/training", "seg_map_path": "annotations/training"}


@pytest.fixture
def scenes(tmp_path):
    write_ade20k(tmp_path, 2, 0, (32, 32), 0)
    return tmp_path


def load(folder, num_classes=18):
    from downstream.datasets.classes_file import ClassesFileDataset

    return ClassesFileDataset(num_classes, str(folder), data_prefix=PREFIX, pipeline=[])


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"classes": ["a", "b"]}', "lists 2 classes"), ("{}", "does not list"), (None, "does not list")],
)
def test_classes_file_dataset__classes(scenes, content, message):
    path = scenes / "classes.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=message):
        load(scenes)


def look(folder):
    """The errors of the inspection."""
    classes = read_classes(folder / "classes.json")
    pairs = pair_files(*(folder / PREFIX[key] for key in ("img_path", "seg_map_path")))
    return inspect_masks(pairs, "set", classes.labels, classes.names).errors


def test_inspect_masks__errors(scenes):
    assert look(scenes) == []
    assert len(load(scenes)) == 2
    mask = scenes / "annotations/training/00000000.png"
    labels = np.asarray(Image.open(mask)).copy()
    labels[0, 0] = 255  # unlabelled too
    Image.fromarray(labels).save(mask)
    assert look(scenes) == []
    for spoiled, message in (
        (np.where(labels == 255, 19, labels).astype(np.uint8), "has label 19, but the classes end at 18"),
        (np.stack([labels] * 3, axis=-1), "has 3 channels"),
        (labels[:16], "is 32 x 16 px, its image 32 x 32"),
    ):
        Image.fromarray(spoiled).save(mask)
        (error,) = look(scenes)
        assert f"{mask} {message}" in error
    mask.write_bytes(b"no image")
    assert f"{mask} (" in look(scenes)[0]
    mask.unlink()
    assert "1 images have no mask" in look(scenes)[0]
    with pytest.raises(DataError, match="1 images have no mask"):
        load(scenes)
