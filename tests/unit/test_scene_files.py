"""Generated demo scenes on disk: files that other tools can read, and the tool that writes them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_et.commands import scenes
from mae_et.data.scenes.files import (
    VAL_FIRST_INDEX,
    mask_to_rle,
    split_indices,
    write_ade20k,
    write_coco,
    write_image_folder,
)
from mae_et.data.scenes.painter import SCENE_CLASSES, STUFF_CLASSES, make_scene
from mae_et.errors import DataError, UserError


def decode_rle(rle: dict[str, list[int]]) -> np.ndarray:
    """Walks down the columns one pixel at a time."""
    height, width = rle["size"]
    mask = np.zeros((height, width), bool)
    position, value = 0, False
    for run in rle["counts"]:
        for _ in range(run):
            mask[position % height, position // height] = value
            position += 1
        value = not value
    assert position == height * width
    return mask


@pytest.mark.parametrize("kind", ["empty", "full", "random", "first pixel", "last pixel"])
def test_mask_to_rle__decodes_to_the_same_mask(kind: str) -> None:
    mask = np.zeros((7, 5), bool)
    if kind == "full":
        mask[:] = True
    elif kind == "random":
        mask = np.random.default_rng(0).random((7, 5)) < 0.5
    elif kind != "empty":
        mask.flat[0 if kind == "first pixel" else -1] = True
    np.testing.assert_array_equal(decode_rle(mask_to_rle(mask)), mask)


def test_split_indices__never_meet() -> None:
    splits = split_indices(VAL_FIRST_INDEX, 50_000)
    assert splits["train"][-1] < splits["val"][0]
    with pytest.raises(UserError):
        split_indices(VAL_FIRST_INDEX + 1, 0)


def test_write_image_folder__one_folder_for_each_class(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path, 20, (32, 48), seed=1, first_index=100, split="val")
    assert folder == tmp_path / "val"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    expected = [f"{SCENE_CLASSES[make_scene(i, (32, 48), 1).label]}/{i:08d}.jpg" for i in range(100, 120)]
    assert files == sorted(expected)
    scene = make_scene(100, (32, 48), 1)
    stored = np.asarray(Image.open(folder / SCENE_CLASSES[scene.label] / "00000100.jpg"), float)
    assert np.abs(stored - scene.image).mean() < 8


def test_write_coco__annotations_give_back_the_masks(tmp_path: Path) -> None:
    write_coco(tmp_path, 6, 4, (40, 56), seed=2)
    image_ids = []
    for split, first, count in (("train", 0, 6), ("val", VAL_FIRST_INDEX, 4)):
        content = json.loads((tmp_path / "annotations" / f"instances_{split}2017.json").read_text())
        assert [c["name"] for c in content["categories"]] == list(SCENE_CLASSES)
        assert [i["id"] for i in content["images"]] == list(range(first, first + count))
        assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])
        for image in content["images"]:
            scene = make_scene(image["id"], (40, 56), 2)
            assert Image.open(tmp_path / f"{split}2017" / image["file_name"]).size == (image["width"], image["height"])
            entries = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            assert [a["category_id"] for a in entries] == (scene.classes + 1).tolist()
            for entry, mask, box in zip(entries, scene.masks, scene.boxes, strict=True):
                np.testing.assert_array_equal(decode_rle(entry["segmentation"]), mask)
                assert entry["area"] == mask.sum()
                assert entry["bbox"] == [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                assert entry["iscrowd"] == 0
        image_ids += [i["id"] for i in content["images"]]
    assert len(set(image_ids)) == 10


def test_write_ade20k__maps_are_stored_exactly(tmp_path: Path) -> None:
    write_ade20k(tmp_path, 3, 2, (32, 40), seed=0)
    classes = json.loads((tmp_path / "classes.json").read_text())
    assert classes["classes"] == [*SCENE_CLASSES, *STUFF_CLASSES]
    assert len(classes["palette"]) == len(classes["classes"])
    for split, first, count in (("training", 0, 3), ("validation", VAL_FIRST_INDEX, 2)):
        names = sorted(path.stem for path in (tmp_path / "images" / split).iterdir())
        assert names == [f"{i:08d}" for i in range(first, first + count)]
        for name in names:
            stored = Image.open(tmp_path / "annotations" / split / f"{name}.png")
            assert stored.mode == "L"
            np.testing.assert_array_equal(np.asarray(stored), make_scene(int(name), (32, 40)).semantic_map)


def test_write_image_folder__says_what_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        write_image_folder(tmp_path, 1, (32, 32), seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# mae-et scenes
# ---------------------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> None:
    scenes.main(scenes.make_parser().parse_args([str(argument) for argument in arguments]))


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", ["folder", "coco", "ade20k"])
def test_make_demo_data__writes_the_layout(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    run(out, "--layout", layout, "--num-train", 3, "--num-val", 2, "--image-size", 32, 40)
    files = listing(out)
    assert "demo_data.json" in files
    assert len([name for name in files if name.endswith(".jpg")]) == 5
    assert "wrote 3 training and 2 validation scenes of 32 x 40 px" in capsys.readouterr().out


def test_make_demo_data__refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for extra in ([], ["--overwrite"]):  # even then nothing goes that the tool did not write
        with pytest.raises(UserError) as caught:
            run(tmp_path, "--num-train", 1, "--image-size", 32, *extra)
        assert caught.value.exit_code == 1
    assert listing(tmp_path) == {"notes.txt"}


def test_make_demo_data__overwrite_leaves_no_old_images(tmp_path: Path) -> None:
    run(tmp_path, "--layout", "coco", "--num-train", 4, "--num-val", 1, "--image-size", 32)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        run(tmp_path, "--num-train", 2, "--image-size", 32)
    run(tmp_path, "--num-train", 2, "--num-val", 0, "--image-size", 32, "--overwrite")
    labels = [SCENE_CLASSES[make_scene(i, (32, 32)).label] for i in range(2)]
    images = {f"train/{label}/{i:08d}.jpg" for i, label in enumerate(labels)}
    assert listing(tmp_path) == images | {"demo_data.json", "notes.txt"}


@pytest.mark.parametrize(
    "arguments",
    [["--image-size", 8], ["--image-size", 32, 32, 32], ["--num-train", 0], ["--num-val", -1], ["--seed", -1]],
)
def test_make_demo_data__bad_arguments_touch_nothing(arguments: list[object], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run(tmp_path / "new", *arguments)
    assert not (tmp_path / "new").exists()
