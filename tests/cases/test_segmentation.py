"""Images and masks of segmentation that once gave a wrong result or a traceback."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from mae_et.data.scenes.files import write_ade20k
from mae_et.errors import DataError
from tests.downstream.conftest import needs_mm
from tests.downstream.runs import read, train, write_data

pytestmark = [pytest.mark.mm, needs_mm]
ONE = {"train_cfg__max_iters": 1, "train_cfg__val_interval": 1, "default_hooks__visualization__draw": False}
TWO = {
    f"{loader}_dataloader__dataset__num_classes": 2 for loader in ("train", "val")
} | {f"model__{head}_head__num_classes": 2 for head in ("decode", "auxiliary")}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mm"))


@pytest.fixture
def own(data, tmp_path):
    """A copy to change."""
    shutil.copytree(data, tmp_path / "own")
    return tmp_path / "own"


def masks_of(own, split="*"):
    return sorted((own / "ade" / "annotations").glob(f"{split}/*"))


def rewrite_masks(own, function, split="*"):
    for path in masks_of(own, split):
        Image.fromarray(function(np.asarray(Image.open(path)))).save(path)


def write_classes(own, content):
    (own / "ade" / "classes.json").write_text(json.dumps(content))


def inspect(own, tmp_path, **changes):
    from downstream.checks.config import check_data

    return check_data(read(own, "segmentation", tmp_path / "run", **changes), ("train_dataloader", "val_dataloader"))


def texts(findings, severity):
    return [finding["text"] for finding in findings[severity]]


def binary(mask):
    return np.where(mask > 8, 255, 0).astype(np.uint8)


def test_case__S1_no_pixel_is_labelled(own, tmp_path):
    rewrite_masks(own, binary)
    write_classes(own, {"classes": ["background", "object"]})
    with pytest.raises(DataError, match=r'no pixel is labelled in all 4 masks.*0: \d.*255: \d.*\{"road": \[0, 7\]'):
        train(own, "segmentation", tmp_path / "run", **ONE, **TWO)


def test_case__S1_values_map_to_classes_and_background_is_one(own, tmp_path):
    rewrite_masks(own, binary)
    write_classes(own, {"classes": {"background": 0, "object": [255]}})
    summary = train(own, "segmentation", tmp_path / "run", **ONE, **TWO)
    assert summary["last_loss"] > 0
    assert 0 < summary["metrics"]["mIoU"] <= 100
    labels, expected = labels_of(own, tmp_path, 2), binary(np.asarray(Image.open(masks_of(own, "training")[0])))
    assert np.array_equal(labels, (expected == 255).astype(int))


def labels_of(own, tmp_path, num_classes):
    """What the pipeline of the demo config, which says reduce_zero_label nowhere, loads of the first mask."""
    from mmengine.registry import init_default_scope

    from downstream.datasets.classes_file import ClassesFileDataset

    init_default_scope("mmseg")
    prefix = {"img_path": "images/training", "seg_map_path": "annotations/training"}
    steps = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "reduce_zero_label": True}]
    dataset = ClassesFileDataset(num_classes, str(own / "ade"), data_prefix=prefix, pipeline=steps)
    return dataset[0]["gt_seg_map"]


def test_case__S1_several_values_for_a_class_and_ignored_ones(own, tmp_path):
    write_classes(own, {"classes": {"road": [1, 2, 3, 7], "car": list(range(9, 19))}, "ignore": [0, 4, 5, 6, 8, 255]})
    findings = inspect(own, tmp_path, **TWO)
    mask = np.asarray(Image.open(masks_of(own, "training")[0]))
    expected = np.full(mask.shape, 255)
    expected[np.isin(mask, [1, 2, 3, 7])] = 0
    expected[mask >= 9] = 1
    assert np.array_equal(labels_of(own, tmp_path, 2), expected)
    share = np.mean([np.isin(np.asarray(Image.open(p)), [0, 4, 5, 6, 8]).mean() for p in masks_of(own, "training")])
    (unlabelled, *_) = [text for text in texts(findings, "count") if text.endswith("share of pixels unlabelled")]
    assert float(unlabelled.split()[0]) == pytest.approx(share, abs=1e-5)


def test_case__S1_values_that_no_class_has(own, tmp_path):
    write_classes(own, {"classes": {"road": [1, 2, 3, 7], "car": list(range(9, 19))}, "ignore": [0]})
    with pytest.raises(DataError, match=r"has label [4568], but the classes end at 2.*'ignore'|classes\.json"):
        inspect(own, tmp_path, **TWO)
    with pytest.raises(
        DataError, match=r"has the value \d+, which classes\.json does not list"
    ):  # also beyond a sample
        labels_of(own, tmp_path, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"classes": {"a": [1, 2], "b": 2}}, "the value 2 is listed twice"),
        ({"classes": {"a": 1, "b": 300}}, "300 must be a whole number from 0 to 255"),
        ({"classes": {"a": 1, "b": 2.5}}, "does not list the classes|2.5 must be"),
        ({"classes": {"a": 1, "b": []}}, "each needs a name and a value"),
        ({"classes": ["a", "a"]}, "listed twice"),
        ({"classes": 7}, "does not list the classes"),
        ([1], "does not list the classes"),
    ],
)
def test_case__S1_class_lists_that_cannot_be_read(own, tmp_path, content, message):
    write_classes(own, content)
    with pytest.raises(DataError, match=message):
        inspect(own, tmp_path, **TWO)


def test_case__S1_a_shifted_class_list_is_noticed(own, tmp_path):
    """Values 0 and 1 for two classes: the list means 1 and 2."""
    rewrite_masks(own, lambda mask: (mask > 8).astype(np.uint8))
    write_classes(own, {"classes": ["background", "object"]})
    findings = inspect(own, tmp_path, **TWO)
    assert any("1 of 2 classes are not in all 4 masks: object" in text for text in texts(findings, "warning"))


def test_case__S1_masks_of_sixteen_bits(own, tmp_path):
    path = masks_of(own, "training")[0]
    Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) + 256).save(path)  # the low byte is a label
    with pytest.raises(DataError, match=r"has label \d{3}, but the classes end at 18"):
        inspect(own, tmp_path)
    with pytest.raises(DataError, match=r"has the value \d{3}"):
        labels_of(own, tmp_path, 18)


@pytest.mark.parametrize(
    "suffixes", [(".JPG", ".PNG"), (".png", ".png"), (".jpeg", ".bmp"), (".Tif", ".tiff"), (".webp", ".png")]
)
def test_case__S3_any_suffix(own, tmp_path, suffixes):
    for folder, suffix in (("images", suffixes[0]), ("annotations", suffixes[1])):
        for path in sorted((own / "ade" / folder).glob("*/*"))[::2]:
            Image.open(path).save(path.with_suffix(suffix.lower()))
            if path.suffix != suffix.lower():
                path.unlink()
            path.with_suffix(suffix.lower()).rename(path.with_suffix(suffix))
    findings = inspect(own, tmp_path)
    pairs = [text for text in texts(findings, "count") if text.endswith("pairs of image and mask")]
    assert pairs == ["4 pairs of image and mask", "2 pairs of image and mask"]
    summary = train(own, "segmentation", tmp_path / "train", **ONE)
    assert summary["num_val"] == 2
    assert math.isfinite(summary["metrics"]["mIoU"])


def test_case__S3_what_does_not_pair(own, tmp_path):
    images = own / "ade" / "images" / "training"
    (images / "notes.txt").touch()
    first = sorted(images.glob("*.jpg"))[0]
    first.rename(images / "alone.jpg")
    with pytest.raises(DataError, match=r"1 images have no mask, e\.g\. .*alone\.jpg"):
        inspect(own, tmp_path)
    (images / "alone.jpg").unlink()
    counts = texts(inspect(own, tmp_path), "count")
    assert "1 masks have no image (left out)" in counts
    assert "1 other files among the images (left out)" in counts
    second = sorted(images.glob("*.jpg"))[0]
    shutil.copy(second, second.with_suffix(".PNG"))
    with pytest.raises(DataError, match="have the same stem"):
        inspect(own, tmp_path)


@pytest.mark.parametrize("frame", ["displayed", "stored"])
def test_case__S4_masks_as_displayed(own, tmp_path, frame):
    """The loader turns photos by EXIF, and masks never."""
    folder = own / "ade"
    image = sorted((folder / "images" / "training").iterdir())[0]
    exif = Image.Exif()
    exif[274] = 6
    Image.open(image).resize((64, 48)).save(image, exif=exif)
    mask = folder / "annotations" / "training" / f"{image.stem}.png"
    size = (48, 64) if frame == "displayed" else (64, 48)
    Image.open(mask).resize(size, Image.Resampling.NEAREST).save(mask)
    if frame == "stored":
        with pytest.raises(DataError, match=r"is 64 x 48 px, its image 48 x 64 \(turned by EXIF\)"):
            inspect(own, tmp_path)
    else:
        inspect(own, tmp_path)
        train(own, "segmentation", tmp_path / "run", **ONE)


@pytest.mark.parametrize("split", ["training", "validation"])
def test_case__S7_a_split_without_a_labelled_pixel(own, tmp_path, split):
    rewrite_masks(own, lambda mask: np.where(mask % 2, 0, 255).astype(np.uint8), split)
    with pytest.raises(DataError, match=rf"{split}: no pixel is labelled"):
        inspect(own, tmp_path)


def test_case__S7_some_masks_without_a_labelled_pixel(own, tmp_path):
    path = masks_of(own, "training")[1]
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    assert "1 masks without a labelled pixel, in all 4" in texts(inspect(own, tmp_path), "count")


def test_case__S7_the_sample_is_stated_and_extended_where_it_shows_nothing(tmp_path, monkeypatch):
    """Only the last mask has a label; the others decide nothing."""
    from downstream.checks import masks
    from mae_et.data.mask_files import pair_files, read_classes

    write_ade20k(tmp_path, 6, 0, (32, 32), 0)
    paths = sorted((tmp_path / "annotations/training").iterdir())
    for path in paths[:-1]:
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(path)
    monkeypatch.setattr(masks, "NUM_SAMPLED", 2)
    classes = read_classes(tmp_path / "classes.json")

    def look():
        pairs = pair_files(tmp_path / "images/training", tmp_path / "annotations/training")
        return masks.inspect_masks(pairs, "set", classes.labels, classes.names)

    found = look()
    assert found.errors == []
    assert found.counts["masks read for their values"] == 6
    Image.fromarray(np.ones((32, 32), np.uint8)).save(paths[0])
    assert look().counts["masks read for their values"] == 2
    assert "a sample of 2 of 6" in str(look().warnings)


def test_case__S7_own_data_sets_of_mmseg_are_inspected(own, tmp_path):
    """BaseSegDataset takes .jpg alone: what it leaves out is counted."""
    common = {
        f"{loader}_dataloader__dataset__{key}": value
        for loader in ("train", "val")
        for key, value in {
            "type": "BaseSegDataset",
            "metainfo": {"classes": ("a", "b")},
            "reduce_zero_label": True,
        }.items()
    }
    first = sorted((own / "ade" / "images" / "training").iterdir())[0]
    first.rename(first.with_suffix(".JPG"))
    rewrite_masks(own, lambda mask: (mask % 3).astype(np.uint8))
    counts = texts(inspect(own, tmp_path, **{**TWO, **common}), "count")
    assert "3 pairs of image and mask" in counts
    assert "1 other files among the images (left out)" in counts
