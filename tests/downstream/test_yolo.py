"""Labels in YOLO's format become annotations in COCO's."""

import json

import numpy as np
import pytest
from PIL import Image

from downstream.checks.coco import inspect_coco
from downstream.checks.findings import report
from downstream.commands.yolo import main, make_parser
from downstream.datasets.yolo import read_yolo, to_coco
from mae_et.data.mask_files import pair_files
from mae_et.errors import DataError


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "set"
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
    for split, name in (("train", "a"), ("train", "b"), ("train", "c"), ("val", "d")):
        Image.new("RGB", (40, 20)).save(root / "images" / split / f"{name}.jpg")
    turned = Image.Exif()
    turned[274] = 6
    Image.new("RGB", (40, 20)).save(root / "images" / "train" / "e.jpg", exif=turned)
    labels = {
        "train/a": "0 0.5 0.5 0.5 0.5\n1 0.1 0.1 0.5 0.1 0.5 0.9\n0 0.5 0.5 0.5 0.5\n",
        "train/b": "",
        "train/e": "1 0.05 0.5 0.2 1\n",
        "train/lonely": "0 0.5 0.5 0.1 0.1\n",
        "val/d": "0 0.25 0.5 0.5 1\n",
    }
    for name, text in labels.items():
        (root / "labels" / f"{name}.txt").write_text(text)
    (root / "data.yaml").write_text("train: images/train\nval: [images/val]\nnames: {0: cat, 1: dog}\n")
    return root


def test_to_coco__boxes_and_polygons_in_displayed_pixels(data):
    content, findings = to_coco(read_yolo(data / "data.yaml"), "train")
    assert [(e["file_name"], e["width"], e["height"]) for e in content["images"]] == [
        ("images/train/a.jpg", 40, 20), ("images/train/b.jpg", 40, 20), ("images/train/c.jpg", 40, 20),
        ("images/train/e.jpg", 20, 40),
    ]  # fmt: skip
    box, polygon, turned = content["annotations"]
    assert (box["bbox"], box["area"], box["category_id"], "segmentation" in box) == ([10, 5, 20, 10], 200, 1, False)
    assert (polygon["bbox"], polygon["segmentation"]) == ([4, 2, 16, 16], [[4, 2, 20, 2, 20, 18]])
    assert polygon["area"] == 16 * 16 / 2  # a right triangle
    assert (turned["bbox"], turned["image_id"]) == ([0, 0, 3, 40], 4)  # clipped by 1 px: half of a tenth of 20 px
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert findings.errors == []
    assert [text.split(",")[0] for text in findings.warnings] == [
        "1 images have no file of labels",
        "1 files of labels are empty",
        "1 lines are repeated (left out)",
        "1 files of labels have no image (left out)",
    ]


def test_command__writes_what_the_inspection_accepts(data, tmp_path, capsys):
    main(make_parser().parse_args([str(data / "data.yaml"), str(tmp_path / "out")]))
    for split in ("train", "val"):
        found = inspect_coco(tmp_path / "out" / f"{split}.json", data, ["dog", "cat"])
        assert (found.errors, report([found])["warning"]) == ([], [])
    assert len(json.loads((tmp_path / "out" / "val.json").read_text())["annotations"]) == 1
    assert f'data_root="{data}"' in capsys.readouterr().out


def test_to_coco__clipped_boxes_are_counted(data):
    (data / "labels/val/d.txt").write_text("0 0.05 0.5 0.3 1\n")
    content, findings = to_coco(read_yolo(data / "data.yaml"), "val")
    assert content["annotations"][0]["bbox"] == [0, 0, 8, 20]
    assert findings.warnings[0].startswith("1 boxes reach more than 1 px beyond")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 x 0.5 0.1 0.1", "'0 x 0.5 0.1 0.1', not numbers"),
        ("2 0.5 0.5 0.1 0.1", "has class 2, but names lists 2"),
        ("0.5 0.5 0.5 0.1 0.1", "has class 0.5"),
        ("0 0.5 0.5 0.1 0.1 0.9", "has 5 numbers after the class"),
        ("0 20 10 4 4", "fractions of the image's sides, not px"),
        ("0 nan 0.5 0.1 0.1", "coordinates outside 0..1"),
        ("0 0.5 0.5 0 0.1", "has no area"),
    ],
)
def test_to_coco__lines_that_cannot_be_read(data, line, message):
    (data / "labels/val/d.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(DataError, match=r"1 lines of labels cannot be read: .*d\.txt:2 .*" + message):
        report([to_coco(read_yolo(data / "data.yaml"), "val")[1]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: images/trian\nnames: [a]\n", r"train = images/trian does not exist; .*images holds: train, val"),
        ("train: images/train\n", "names = None is not the list of all classes"),
        ("train: images/train\nnames: {0: a, 2: b}\n", "is not the list of all classes"),
        ("train: images/train\nnames: [a, a]\n", "a name occurs twice"),
        ("names: [a]\n", "names no images"),
        ("kpt_shape: [17, 3]\ntrain: images/train\nnames: [a]\n", "hold key points"),
        ("[1", "cannot be read"),
        ("- 1", "is not a data.yaml"),
    ],
)
def test_read_yolo__faults(data, content, message):
    (data / "data.yaml").write_text(content)
    with pytest.raises(DataError, match=message):
        read_yolo(data / "data.yaml")


def test_read_yolo__roots_and_list_files(data, tmp_path):
    (data / "val.txt").write_text("./images/val/d.jpg\n")
    (tmp_path / "other.yaml").write_text("path: set\ntrain: ../images/train\nval: val.txt\nnames: [cat, dog]\n")
    found = read_yolo(tmp_path / "other.yaml")
    assert [image["file_name"] for image in to_coco(found, "val")[0]["images"]] == ["images/val/d.jpg"]
    (data / "labels").rename(data / "other")
    with pytest.raises(DataError, match=r"no image has an object. The labels are looked for in .*labels/train"):
        report([to_coco(found, "train")[1]])


def test_pair_files__masks_beside_their_images(tmp_path):
    for name in ("x.jpg", "x_mask.png", "y.png", "y_mask.png"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    pairs = pair_files(tmp_path, tmp_path, mask_suffix="_mask.png")
    assert [(i.name, m.name) for i, m in pairs.files] == [("x.jpg", "x_mask.png"), ("y.png", "y_mask.png")]
    assert ([*pairs.lonely_images, *pairs.lonely_masks], [path.name for path in pairs.others]) == ([], ["notes.txt"])
    assert [m.name for _, m in pair_files(tmp_path, tmp_path, None, ".png", "_mask.png").files] == ["y_mask.png"]
    with pytest.raises(DataError, match=r"are in one folder, .* Set seg_map_suffix"):
        pair_files(tmp_path, tmp_path)
