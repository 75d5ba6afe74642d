"""What is said about COCO annotations that do not fit their images or classes."""

import json

import pytest

from downstream.checks.coco import check_coco
from mae_et.data.scenes.files import write_coco
from mae_et.data.scenes.painter import SCENE_CLASSES
from mae_et.errors import DataError


@pytest.fixture
def data(tmp_path):
    write_coco(tmp_path, 3, 0, (32, 32), 0)
    return tmp_path / "annotations" / "instances_train2017.json", tmp_path / "train2017"


def test_check_coco__in_order(data):
    check_coco(*data, SCENE_CLASSES)
    check_coco(*data)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c["annotations"][0].update(category_id=77), r"category ids \[77\]"),
        (lambda c: c["annotations"][0].update(image_id=5000), r"image ids are annotated.*5000"),
        (lambda c: c["images"][0].update(file_name="x.jpg"), r"1 of 3 images are not in .*x\.jpg"),
        (lambda c: c["categories"][0].update(name="globe"), "classes ball are not in 'categories' .globe"),
        (lambda c: c.pop("images"), "not in COCO's form"),
        (lambda c: c.update(images=[], annotations=[]), "names no images"),
    ],
)
def test_check_coco__faults_are_named(data, spoil, said):
    content = json.loads(data[0].read_text())
    spoil(content)
    data[0].write_text(json.dumps(content))
    with pytest.raises(DataError, match=said):
        check_coco(*data, SCENE_CLASSES)


def test_check_coco__files(data):
    with pytest.raises(DataError, match="no such annotations"):
        check_coco(data[1] / "x.json", data[1])
    data[0].write_text("{")
    with pytest.raises(DataError, match="not in COCO's form"):
        check_coco(*data)
