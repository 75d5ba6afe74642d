"""torchvision's data sets, read from tiny copies in the formats that torchvision finds on disk."""

import json
import pickle
import sys
import types

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from mae_et.data.decoding import BadImageError
from mae_et.data.sources import torchvision_sets
from mae_et.data.sources.spec import open_source
from mae_et.errors import DataError
from tests.unit.shard_files import png

NAMES = {"cifar10": ["aeroplane", "automobile"], "cifar100": ["apple", "baby", "chair"]}


def write_cifar(root, name, monkeypatch):
    """Batches of 4 images whose pixels are all 10 * batch + number; the checksums of real files cannot be met."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    cls = getattr(datasets, torchvision_sets.SETS[name].class_name)
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"
    for batch, (file, _) in enumerate(cls.train_list + cls.test_list):
        pixels = np.repeat(10 * batch + np.arange(4, dtype=np.uint8)[:, None], 3072, axis=1)
        pixels[:, :1024] += 100  # the red plane comes first
        entry = {"data": pixels, key: [number % len(NAMES[name]) for number in range(4)]}
        (folder / file).write_bytes(pickle.dumps(entry))
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps({cls.meta["key"]: NAMES[name]}))


def write_pets(root):
    images, annotations = root / "oxford-iiit-pet" / "images", root / "oxford-iiit-pet" / "annotations"
    images.mkdir(parents=True)
    annotations.mkdir()
    for split, numbers in (("trainval", [1, 2]), ("test", [3])):
        lines = []
        for number in numbers:
            for label, breed in ((1, "Abyssinian"), (2, "american_bulldog")):
                Image.new("RGB", (8, 6), (number * 20, label, 0)).save(images / f"{breed}_{number}.jpg", quality=100)
                lines.append(f"{breed}_{number} {label} {1 + (label == 2)} 1")
        (annotations / f"{split}.txt").write_text("\n".join(lines) + "\n")


def write_food(root):
    images, meta = root / "food-101" / "images", root / "food-101" / "meta"
    meta.mkdir(parents=True)
    for split, numbers in (("train", [5, 6]), ("test", [7])):
        listed = {}
        for dish in ("waffles", "apple_pie"):  # not sorted in the file
            (images / dish).mkdir(parents=True, exist_ok=True)
            listed[dish] = [f"{dish}/{number}" for number in numbers]
            for number in numbers:
                (images / dish / f"{number}.jpg").write_bytes(png(number))
        (meta / f"{split}.json").write_text(json.dumps(listed))


def write_flowers(root, monkeypatch):
    """The lists are MATLAB files; a stand-in for scipy's reader gives their content."""
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for number in range(1, 7):
        (folder / "jpg" / f"image_{number:05d}.jpg").write_bytes(png(number))
    content = {
        "setid.mat": {"trnid": np.array([6, 1]), "valid": np.array([3, 2]), "tstid": np.array([4, 5])},
        "imagelabels.mat": {"labels": np.array([1, 1, 102, 7, 7, 2])},
    }
    for name in content:
        (folder / name).write_bytes(b"MATLAB")
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5=None: True)
    reader = types.ModuleType("scipy.io")
    reader.loadmat = lambda path, squeeze_me: content[path.name]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.io", reader)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar__pixels_labels_and_splits(tmp_path, monkeypatch, name):
    write_cifar(tmp_path, name, monkeypatch)
    num_batches = {"cifar10": 5, "cifar100": 1}[name]
    train, test = (open_source(f"torchvision:{name}@{tmp_path}{split}") for split in ("", ",split=test"))
    assert (len(train), len(test)) == (4 * num_batches, 4)
    assert train.class_names == NAMES[name]
    assert list(train.labels) == [i % len(NAMES[name]) for i in range(4)] * num_batches
    assert len({source.name(i) for source in (train, test) for i in range(len(source))}) == len(train) + len(test)
    for source, first in ((train, 0), (test, 10 * num_batches)):
        image = source.load(2)
        assert (image.mode, image.size) == ("RGB", (32, 32))
        assert image.getpixel((5, 7)) == (first + 102, first + 2, first + 2)
    assert open_source(f"torchvision:{name}@{tmp_path}", num_channels=1).load(0).mode == "L"
    with pytest.raises(IndexError):
        train.load(len(train))


def test_cifar__survives_a_trip_to_a_loader_process(tmp_path, monkeypatch):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    source = open_source(f"torchvision:cifar10@{tmp_path}")
    again = pickle.loads(pickle.dumps(source))
    assert again.load(3).tobytes() == source.load(3).tobytes()
    assert list(again.labels) == list(source.labels)


def test_pets__files_breeds_and_splits(tmp_path):
    write_pets(tmp_path)
    source = open_source(f"torchvision:oxford_iiit_pet@{tmp_path}")
    oracle = datasets.OxfordIIITPet(str(tmp_path), "trainval")
    assert len(source) == len(oracle) == 4
    assert source.class_names == oracle.classes == ["Abyssinian", "American Bulldog"]
    for i in range(4):
        image, label = oracle[i]
        assert source.labels[i] == label
        assert source.load(i).tobytes() == image.tobytes()
    assert source.name(0) == f"{tmp_path}/oxford-iiit-pet/images/Abyssinian_1.jpg"
    assert len(open_source(f"torchvision:oxford_iiit_pet@{tmp_path},split=test")) == 2


def test_food__files_and_classes_in_order(tmp_path):
    write_food(tmp_path)
    source = open_source(f"torchvision:food101@{tmp_path},split=train", need_labels=True)
    assert source.class_names == ["apple_pie", "waffles"]
    names = {source.name(i).removeprefix(f"{tmp_path}/food-101/images/"): source.labels[i] for i in range(len(source))}
    assert names == {"waffles/5.jpg": 1, "waffles/6.jpg": 1, "apple_pie/5.jpg": 0, "apple_pie/6.jpg": 0}
    assert pickle.loads(pickle.dumps(source)).load(3).mode == "RGB"


def test_flowers__splits_and_trainval(tmp_path, monkeypatch):
    write_flowers(tmp_path, monkeypatch)

    def seen(split):
        source = open_source(f"torchvision:flowers102@{tmp_path}{split}")
        return [(source.name(i)[-9:-4], source.labels[i]) for i in range(len(source))]

    train, val = [("00006", 1), ("00001", 0)], [("00003", 101), ("00002", 0)]
    assert seen("") == seen(",split=train") == train
    assert seen(",split=val") == val
    assert seen(",split=trainval") == train + val
    assert seen(",split=test") == [("00004", 6), ("00005", 6)]
    classes = open_source(f"torchvision:flowers102@{tmp_path}").class_names
    assert classes is None or (len(classes), classes[0]) == (102, "pink primrose")


def test_files__decoded_like_a_folder(tmp_path):
    """Upright, CMYK converted, and a broken file is a bad image: torchvision's own loader does none of this."""
    write_pets(tmp_path)
    images = tmp_path / "oxford-iiit-pet" / "images"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(images / "Abyssinian_1.jpg", exif=exif)
    Image.new("CMYK", (8, 6), (255, 0, 0, 0)).save(images / "american_bulldog_1.jpg")
    (images / "Abyssinian_2.jpg").write_bytes(b"")
    (images / "american_bulldog_2.jpg").unlink()
    source, folder = open_source(f"torchvision:oxford_iiit_pet@{tmp_path}"), open_source(str(images))
    assert source.load(0).size == (6, 8)
    for i in (0, 1):
        place = [folder.name(j) for j in range(len(folder))].index(source.name(i))
        assert source.load(i).tobytes() == folder.load(place).tobytes()
    assert source.load(1).mode == "RGB"
    for i, reason in ((2, "empty file"), (3, "cannot be read")):
        with pytest.raises(BadImageError, match=reason):
            source.load(i)


@pytest.mark.parametrize("name", list(torchvision_sets.SETS))
def test_missing__says_where_and_how_to_download_and_downloads_nothing(tmp_path, monkeypatch, name):
    def forbidden(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("urllib.request.urlopen", forbidden)
    known = torchvision_sets.SETS[name]
    with pytest.raises(DataError) as caught:
        open_source(f"torchvision:{name}@{tmp_path}/data")
    message = str(caught.value)
    assert f"{tmp_path}/data/{known.folder} does not exist" in message
    assert (
        f"from torchvision.datasets import {known.class_name}; {known.class_name}('{tmp_path}/data', download=True)"
        in message
    )
    assert not (tmp_path / "data").exists()


def test_missing__inner_folder_named(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=r"ROOT is the folder above cifar-10-batches-py"):
        open_source(f"torchvision:cifar10@{tmp_path}/cifar-10-batches-py")


def test_damaged__says_so(tmp_path):
    write_food(tmp_path)
    (tmp_path / "food-101" / "meta" / "train.json").write_text('{"waffles": ["waf')
    with pytest.raises(DataError, match=r"food-101 is incomplete or damaged \(.+\); nothing is downloaded here"):
        open_source(f"torchvision:food101@{tmp_path}")
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match="cifar-10-batches-py is incomplete or damaged; nothing"):
        open_source(f"torchvision:cifar10@{tmp_path}")


def test_flowers__without_scipy(tmp_path, monkeypatch):
    write_flowers(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(DataError, match=r"flowers102 cannot be read without scipy.*: pip install scipy"):
        open_source(f"torchvision:flowers102@{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:cifar10", "cannot be read; a data set of torchvision is written torchvision:NAME@ROOT"),
        ("torchvision:cifar10@", "cannot be read"),
        ("torchvision:@data", "cannot be read"),
        (
            "torchvision:mnist@data",
            "is not a known data set; known are cifar10, cifar100, flowers102, oxford_iiit_pet, food101",
        ),
        ("torchvision:cifar10@data,split=val", "cifar10 has no split 'val'; it has train, test"),
        ("torchvision:oxford_iiit_pet@data,split=train", "no split 'train'; it has trainval, test"),
        ("torchvision:cifar10@data,split=", "no split ''"),
    ],
)
def test_open_source__torchvision_misspelt(spec, message):
    with pytest.raises(DataError, match=message):
        open_source(spec)


def test_open_source__root_with_comma_and_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_food(tmp_path / "a,b")
    source = open_source("torchvision:food101@~/a,b,split=test")
    assert len(source) == 2
    assert source.load(0).mode == "RGB"
