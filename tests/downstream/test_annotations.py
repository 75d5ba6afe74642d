"""Findings about COCO annotations that do not fit their images or classes."""

import json
import os

import pytest

from downstream.checks.coco import inspect_coco
from downstream.checks.findings import report
from mae_et.data.scenes.files import write_coco
from mae_et.data.scenes.painter import SCENE_CLASSES
from mae_et.errors import DataError


@pytest.fixture
def data(tmp_path):
    write_coco(tmp_path, 3, 0, (32, 32), 0)
    return tmp_path / "annotations" / "instances_train2017.json", tmp_path / "train2017"


def test_inspect_coco__nothing_wrong(data):
    for classes in (SCENE_CLASSES, None):
        findings = inspect_coco(*data, classes, is_scored=True, drops_empty=True, needs_masks=True)
        assert (findings.errors, findings.warnings) == ([], [])
        assert findings.counts["images"] == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c["annotations"][0].update(category_id=77), r"category ids 77 are used, but not in"),
        (
            lambda c: c["annotations"][0].update(image_id=5000),
            r"1 objects are on images that are not in 'images'.*5000",
        ),
        (lambda c: c["images"][0].update(file_name="x.jpg"), r"1 of 3 images are not in .*x\.jpg"),
        (lambda c: c["categories"][0].update(name="globe"), "classes ball are not in 'categories' .globe"),
        (lambda c: c.pop("images"), "not in COCO's form"),
        (lambda c: c.update(images=[], annotations=[]), "lists no images"),
        (lambda c: c["images"].append(dict(c["images"][0])), "image ids occur more than once: 0"),
        (lambda c: c["images"][0].pop("width"), "1 of 3 entries of 'images' have no 'width'"),
        (lambda c: c["images"][0].update(height="64"), "'height' of 1 entries of 'images' has a wrong type, e.g. 64"),
        (lambda c: c["annotations"][0]["segmentation"].update(size=[32, 31]), "run lengths of 1 masks"),
    ],
)
def test_inspect_coco__errors(data, spoil, message):
    content = json.loads(data[0].read_text())
    spoil(content)
    data[0].write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        report([inspect_coco(*data, SCENE_CLASSES, needs_masks=True)])


def test_inspect_coco__files(data):
    with pytest.raises(DataError, match="no such annotations"):
        inspect_coco(data[1] / "x.json", data[1])
    for content in ("{", "[]", '{"images": 1}', "\x00"):
        data[0].write_text(content)
        with pytest.raises(DataError, match="not in COCO's form"):
            inspect_coco(*data)


def test_inspect_coco__broken_images(data):
    first, second, _ = sorted(data[1].iterdir())
    first.write_bytes(b"no image")
    second.unlink()
    os.mkfifo(second)  # reading it would block
    findings = inspect_coco(*data)
    assert len(findings.errors) == 2
    assert "1 of 3 images are not in" in findings.errors[0]
    assert "1 images cannot be read" in findings.errors[1]


def test_inspect_coco__what_is_left_out_is_counted(data):
    content = json.loads(data[0].read_text())
    first, second, *_ = content["annotations"]
    first["bbox"][2] = 0.5
    second["bbox"][0] = 40
    content["annotations"][2]["iscrowd"] = 1
    content["annotations"][3]["ignore"] = True
    data[0].write_text(json.dumps(content))
    findings = inspect_coco(*data, SCENE_CLASSES, min_size=33)
    assert findings.counts["objects are smaller than 1 px (left out)"] == 1
    assert findings.counts["boxes lie outside of their image (left out)"] == 1
    assert findings.counts["crowd objects (not learned, not counted as errors)"] == 1
    assert findings.counts["objects marked 'ignore' (left out)"] == 1
    assert findings.counts["images are smaller than filter_cfg.min_size = 33 px (left out)"] == 3
    assert "all images are smaller than filter_cfg.min_size = 33" in findings.errors[0]
