"""Annotations, images, weights and options of detection that once gave a wrong result or a traceback."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mae_et.errors import DataError
from tests.downstream.conftest import needs_mm
from tests.downstream.runs import read, train, write_data

pytestmark = [pytest.mark.mm, needs_mm]
ONE = {"train_cfg__max_iters": 1, "train_cfg__val_interval": 1, "default_hooks__visualization__draw": False}
TRAIN, VAL = "instances_train2017.json", "instances_val2017.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mm"))


@pytest.fixture
def own(data, tmp_path):
    """A copy to change."""
    shutil.copytree(data, tmp_path / "own")
    return tmp_path / "own"


def change(own, name, function):
    path = own / "coco" / "annotations" / name
    content = json.loads(path.read_text())
    function(content)
    path.write_text(json.dumps(content))


def inspect(own, tmp_path, loaders=("train_dataloader", "val_dataloader"), **changes):
    """Returns the findings of a demo config, after `prepare`."""
    from downstream import run
    from downstream.checks.config import check_data

    config = read(own, "detection", tmp_path / "run", **changes)
    run.prepare(config)
    return check_data(config, loaders)


def score_of_perfect_predictions(own, tmp_path):
    """AP of boxes and masks if each object of the training json is predicted, with labels by the names of the config."""
    from mmdet.datasets.transforms import LoadAnnotations
    from mmdet.registry import DATASETS, METRICS
    from mmengine.registry import init_default_scope

    from downstream import run

    config = read(own, "detection", tmp_path / "run")
    run.prepare(config)
    init_default_scope("mmdet")
    dataset = DATASETS.build({**config.val_dataloader.dataset, "pipeline": []})
    content = json.loads((own / "coco" / "annotations" / VAL).read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    metric = METRICS.build(config.val_evaluator)
    metric.dataset_meta = dataset.metainfo
    classes = list(config.val_dataloader.dataset.metainfo.classes)
    load = LoadAnnotations(with_bbox=True, with_mask=True)
    for image in content["images"]:
        objects = [item for item in content["annotations"] if item["image_id"] == image["id"]]
        shape = (image["height"], image["width"])
        masks = [load._poly2mask(x["segmentation"], *shape) for x in objects]
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (item["bbox"] for item in objects)])
        labels = torch.tensor([classes.index(names[item["category_id"]]) for item in objects])
        predicted = {
            "bboxes": boxes, "scores": torch.ones(len(objects)), "labels": labels,
            "masks": torch.tensor(np.stack(masks)).bool(),
        }  # fmt: skip
        metric.process({}, [{"pred_instances": predicted, "img_id": image["id"], "ori_shape": shape}])
    metrics = metric.evaluate(len(content["images"]))
    # What the training would learn: labels of the data set, by name.
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        learned = sorted(classes[instance["bbox_label"]] for instance in info["instances"])
        objects = [item for item in content["annotations"] if item["image_id"] == info["img_id"]]
        assert learned == sorted(names[item["category_id"]] for item in objects)
    return metrics["coco/bbox_mAP"], metrics["coco/segm_mAP"]


@pytest.mark.parametrize(
    "function",
    [
        lambda c: c["categories"].reverse(),
        lambda c: c.update(categories=sorted(c["categories"], key=lambda x: x["name"])),
        lambda c: c["categories"].insert(0, {"id": 77, "name": "unused"}),
    ],
    ids=["reversed", "alphabetical", "one_more"],
)
def test_case__D1_labels_follow_class_names(own, tmp_path, function):
    change(own, VAL, function)
    assert score_of_perfect_predictions(own, tmp_path) == (1.0, 1.0)


def test_case__D1b_labels_of_training_follow_class_names(own, tmp_path):
    from mmdet.registry import DATASETS
    from mmengine.registry import init_default_scope

    from downstream import run

    change(own, TRAIN, lambda c: c["categories"].reverse())
    config = read(own, "detection", tmp_path / "run")
    run.prepare(config)
    init_default_scope("mmdet")
    dataset = DATASETS.build({**config.train_dataloader.dataset, "pipeline": []})
    content = json.loads((own / "coco" / "annotations" / TRAIN).read_text())
    ids = {category["name"]: category["id"] for category in content["categories"]}
    expected = {ids[name]: label for label, name in enumerate(dataset.metainfo["classes"])}
    assert dataset.cat2label == expected


@pytest.mark.parametrize("split", [TRAIN, VAL])
def test_case__D2_one_name_twice(own, tmp_path, split):
    change(own, split, lambda c: c["categories"].insert(0, {"id": 0, "name": "cone"}))
    with pytest.raises(DataError, match=r"class name 'cone' is used by categories 0 and 3"):
        inspect(own, tmp_path)


@pytest.mark.parametrize("area", ["absent", "null", "zero"])
def test_case__D3_objects_without_area_or_iscrowd(own, tmp_path, area):
    def remove(content):
        for item in content["annotations"]:
            item.pop("iscrowd", None)
            if area == "absent":
                item.pop("area")
            else:
                item["area"] = None if area == "null" else 0

    before = json.loads((own / "coco" / "annotations" / VAL).read_text())
    change(own, VAL, remove)
    counts = [finding["text"] for finding in inspect(own, tmp_path, ("val_dataloader",))["count"]]
    assert f"{len(before['annotations'])} objects without area (computed)" in counts
    assert f"{len(before['annotations'])} objects without iscrowd (taken as 0)" in counts
    assert score_of_perfect_predictions(own, tmp_path) == (1.0, 1.0)
    from downstream.datasets.coco import CocoByNames

    read_back = CocoByNames(str(own / "coco" / "annotations" / VAL))
    expected = [item["area"] for item in before["annotations"]]
    assert [item["area"] for item in read_back.dataset["annotations"]] == pytest.approx(expected)


@pytest.mark.parametrize("first_id", [0, -3])
def test_case__D5_annotation_ids_do_not_matter(own, tmp_path, first_id):
    def renumber(content):
        for number, item in enumerate(content["annotations"]):
            item["id"] = first_id + number

    change(own, VAL, renumber)
    assert score_of_perfect_predictions(own, tmp_path) == (1.0, 1.0)


def test_case__D5_repeated_annotation_ids(own, tmp_path):
    change(own, VAL, lambda c: [item.update(id=1) for item in c["annotations"]])
    assert score_of_perfect_predictions(own, tmp_path) == (1.0, 1.0)


@pytest.mark.parametrize("outline", ["absent", [], None, [[1, 2, 3, 4]], {"counts": []}])
@pytest.mark.parametrize("split", [TRAIN, VAL])
def test_case__D7_objects_without_masks(own, tmp_path, split, outline):
    def remove(content):
        for item in content["annotations"][:2]:
            if outline == "absent":
                item.pop("segmentation")
            else:
                item["segmentation"] = outline

    change(own, split, remove)
    with pytest.raises(DataError, match=r"2 of \d+ objects have no usable 'segmentation', e\.g\. object"):
        inspect(own, tmp_path)


def test_case__D8_boxes_in_fractions_of_the_image(own, tmp_path):
    change(own, TRAIN, lambda c: [x.update(bbox=[v / 64 for v in x["bbox"]]) for x in c["annotations"]])
    with pytest.raises(DataError, match=r"no object is at least 1 px wide and high.*multiply fractions"):
        inspect(own, tmp_path)


def test_case__D8_boxes_as_two_corners(own, tmp_path):
    def corners(content):
        for item in content["annotations"]:
            x, y, width, height = item["bbox"]
            item["bbox"] = [x + 40, y + 40, x + 40 + width, y + 40 + height]

    change(own, TRAIN, corners)
    with pytest.raises(DataError, match=r"boxes reach outside of their image.*not \[x1, y1, x2, y2\]"):
        inspect(own, tmp_path)


@pytest.mark.parametrize("box", [None, [1, 2, 3], [1, 2, float("nan"), 4], "1 2 3 4"])
def test_case__D8_boxes_that_are_none(own, tmp_path, box):
    change(own, TRAIN, lambda c: c["annotations"][0].update(bbox=box))
    with pytest.raises(DataError, match=r"have no 'bbox'|have no box"):
        inspect(own, tmp_path)


def test_case__D9_sizes_differ_from_the_files(own, tmp_path):
    change(own, VAL, lambda c: c["images"][1].update(width=65))
    with pytest.raises(
        DataError, match=r"1 images have another size.*10000001\.jpg: 65 x 64 px in the json, 64 x 64 px as loaded"
    ):
        inspect(own, tmp_path)


def turn(own, split, orientation, size):
    """Stores the first image with an EXIF orientation; returns its path."""
    content = json.loads((own / "coco" / "annotations" / split).read_text())
    path = own / "coco" / split[len("instances_") : -len(".json")] / content["images"][0]["file_name"]
    exif = Image.Exif()
    exif[274] = orientation
    Image.open(path).resize(size).save(path, exif=exif)
    return path


def resize_first(own, width, height):
    """Gives the first validation image another size in the json, and takes its objects away."""

    def resize(content):
        first = content["images"][0]
        first.update(width=width, height=height)
        content["annotations"] = [item for item in content["annotations"] if item["image_id"] != first["id"]]

    change(own, VAL, resize)


def test_case__D10_annotations_in_stored_pixels(own, tmp_path):
    turn(own, VAL, 6, (64, 48))
    resize_first(own, 64, 48)
    with pytest.raises(
        DataError, match=r"turned by EXIF, and the json has their stored size.*color_ignore_orientation"
    ):
        inspect(own, tmp_path)
    stored = {"val_dataloader__dataset__pipeline__0__color_type": "color_ignore_orientation"}
    assert len(inspect(own, tmp_path, **stored)) == 2  # the fix that was printed


def test_case__D10_annotations_in_displayed_pixels(own, tmp_path):
    import mmcv

    path = turn(own, VAL, 6, (64, 48))
    assert mmcv.imread(str(path)).shape[:2] == (64, 48)  # the loader turns it
    resize_first(own, 48, 64)
    counts = [finding["text"] for finding in inspect(own, tmp_path)["count"]]
    assert "1 images with an EXIF orientation" in counts


def test_case__D10_orientation_that_sizes_do_not_prove(own, tmp_path):
    turn(own, VAL, 6, (64, 64))
    findings = inspect(own, tmp_path)
    assert "EXIF orientation that their size does not prove" in str(findings["warning"])


def test_case__D16_no_object_in_the_validation_set(own, tmp_path):
    change(own, VAL, lambda c: c.update(annotations=[]))
    with pytest.raises(DataError, match=r"val2017\.json: no object is of these classes, so AP is not defined"):
        train(own, "detection", tmp_path / "run", **ONE)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_case__D16_no_ap_of_sizes_that_do_not_occur(data, tmp_path):
    summary = train(data, "detection", tmp_path, **ONE)
    assert "coco/bbox_mAP" in summary["metrics"]
    assert "coco/bbox_mAP_l" not in summary["metrics"]  # no object is larger than 96 px
    assert -1 not in summary["metrics"].values()
