"""Class lists: their order, what a folder lacks or has besides, and the expected number of classes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from timm.data import ImageNetInfo

from mae_et.config.schema import from_dict
from mae_et.config.supervised import SupervisedConfig
from mae_et.data.inspection import inspect_images
from mae_et.data.sources.class_list import TIMM_LISTS, class_list
from mae_et.errors import DataError
from mae_et.tasks.classification import open_labelled
from mae_et.tasks.run import TaskData
from tests.unit.shard_files import make_tar, png

SYNSETS = ["n03", "n01", "n05", "n02"]  # not sorted: the list decides


def make_folder(root: Path, *synsets: str) -> Path:
    for number, synset in enumerate(synsets):
        (root / synset).mkdir(parents=True)
        for i in range(2):
            (root / synset / f"{i}.png").write_bytes(png(10 * number + i))
    return root


def open_data(train: Path | str, **data: Any) -> TaskData:
    return open_labelled(from_dict(SupervisedConfig, {"data": {"train": str(train), **data}}))


@pytest.fixture
def listed(tmp_path: Path) -> str:
    path = tmp_path / "synsets.txt"
    path.write_text("\n".join(SYNSETS) + "\n")
    return str(path)


@pytest.mark.parametrize("name", TIMM_LISTS)
def test_class_list__of_timm(name: str) -> None:
    assert class_list(name) == ImageNetInfo(name).label_names()


def test_class_list__imagenet_22k_lacks_one_class_of_1k() -> None:
    large, small = class_list("ImageNet-22k"), class_list("imagenet-1k")
    assert (len(large), len(small)) == (21_841, 1000)
    known = set(large)
    assert [i for i, name in enumerate(small) if name not in known] == [850]


@pytest.mark.parametrize(
    ("text", "words"),
    [("n01\nn02\nn01\n", "1 names more than once: n01"), ("n01\n\nn02\n", "empty line 2"), ("", "empty line 1")],
)
def test_class_list__faulty_file(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        class_list(str(path))


def test_class_list__unknown_name() -> None:
    with pytest.raises(DataError, match=r"data\.classes = 'imagenet-23k' is neither .* imagenet-22k,"):
        class_list("imagenet-23k")


def test_classes__missing_ones_keep_their_numbers(
    listed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path / "train", "n01", "n02", "n03")
    with caplog.at_level(logging.WARNING):
        data = open_data(folder, classes=listed)
    assert data.class_names == tuple(SYNSETS)
    assert data.train.labels is not None
    folders = [data.train.key(i).split("/")[0] for i in range(len(data.train))]
    assert [SYNSETS[label] for label in data.train.labels] == folders
    assert "data.train has no image of 1 of the 4 classes" in caplog.text
    assert "n05" in caplog.text
    (finding,) = [item for item in inspect_images(data.train).items if item.kind == "empty_classes"]
    assert finding.text == "images: 1 of 4 classes have no image: n05"


def test_classes__both_splits_have_the_numbers_of_the_list(listed: str, tmp_path: Path) -> None:
    train, val = make_folder(tmp_path / "train", "n01", "n02"), make_folder(tmp_path / "val", "n05", "n01")
    data = open_data(train, val=str(val), classes=listed)
    assert data.val is not None
    assert set(np.asarray(data.val.labels).tolist()) == {SYNSETS.index("n05"), SYNSETS.index("n01")}


@pytest.mark.parametrize("split", ["train", "val"])
def test_classes__extra_synsets_are_refused_by_name(split: str, listed: str, tmp_path: Path) -> None:
    good = make_folder(tmp_path / "good", *SYNSETS)
    bad = make_folder(tmp_path / "bad", "n01", "n77", "n99")
    paths = {"train": str(good), "val": str(good), split: str(bad)}
    with pytest.raises(DataError, match=rf"data\.{split} has 2 classes that .* does not list: n77, n99; move"):
        open_data(paths["train"], val=paths["val"], classes=listed)


def test_classes__number_the_labels_of_shards(listed: str, tmp_path: Path) -> None:
    members = [pair for n in range(3) for pair in ((f"{n}.png", png(n)), (f"{n}.cls", str(n).encode()))]
    shard = make_tar(tmp_path / "a.tar", members)
    data = open_data(shard, classes=listed)
    assert (np.asarray(data.train.labels).tolist(), data.class_names) == ([0, 1, 2], tuple(SYNSETS))
    shard = make_tar(tmp_path / "b.tar", [*members, ("x.png", png(9)), ("x.cls", b"4")])
    with pytest.raises(DataError, match=r"class index 4, but .* lists 4 classes, numbered from 0"):
        open_data(shard, classes=listed)


def test_classes__of_generated_scenes_are_their_own(listed: str) -> None:
    with pytest.raises(DataError, match="folders, tables and shards"):
        open_data("scenes:4@32", classes=listed)


@pytest.mark.parametrize(("wanted", "words"), [(4, "3 classes, 1 fewer than"), (2, "3 classes, 1 more than")])
def test_num_classes__refuses_other_numbers_with_the_difference(wanted: int, words: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "train", "n01", "n02", "n03")
    assert len(open_data(folder, num_classes=3).class_names) == 3
    with pytest.raises(DataError, match=rf"{words} data\.num_classes = {wanted}"):
        open_data(folder, num_classes=wanted)


def test_labels__missing_ones_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    with pytest.raises(DataError, match=r"no labels, which are needed here: .* move every image into a subfolder"):
        open_data(tmp_path)


def test_classes__an_empty_one_without_a_list_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "train", "n01", "n02")
    (folder / "n03").mkdir()
    with pytest.raises(DataError, match=r"1 of 3 classes have no image in data\.train: n03; .* data\.classes"):
        open_data(folder)
