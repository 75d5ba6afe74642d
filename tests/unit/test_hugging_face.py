"""Data sets of Hugging Face on the local disk."""

import pickle
import socket

import pytest

from mae_et.data.decoding import BadImageError
from mae_et.data.sources.spec import open_source
from mae_et.errors import DataError
from tests.unit.shard_files import png, value_of

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "number": datasets.Value("int64"),
            "name": datasets.Value("string"),
            "stored": datasets.Value("binary"),
            "file": datasets.Value("string"),
        }
    )
    columns = {
        "image": [{"bytes": png(i), "path": f"p/{i}.png"} for i in range(4)] + [None],
        "label": [0, 1, 1, 0, -1],
        "number": [3, 0, 1, 2, 0],
        "name": ["x", "y", "x", "y", "y"],
        "stored": [png(i) for i in range(5)],
        "file": [f"../{4 - i}.png" for i in range(5)],
    }
    for i in range(5):
        (root / f"{i}.png").write_bytes(png(i))
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.select([3, 0, 2]).save_to_disk(root / "one")
    datasets.DatasetDict({"train": rows.select(range(4)), "test": rows}).save_to_disk(root / "two")
    (root / "hub" / "data").mkdir(parents=True)
    rows.select(range(4)).to_parquet(root / "hub" / "data" / "train-00000-of-00001.parquet")
    return root


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path / "cache"))

    def refuse(*_):
        raise AssertionError("a data set on disk needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def values(source):
    return [value_of(source.load(index)) for index in range(len(source))]


def test_saved__is_read_where_it_is(folder):
    source = open_source(f"datasets:{folder}/one", need_labels=True)
    assert values(source) == [3, 0, 2]
    assert (source.labels.tolist(), source.class_names) == ([0, 0, 1], ["cat", "dog"])
    assert source.name(1) == f"{folder}/one/1:0.png"  # save_to_disk keeps the last part of a path
    assert source.read(0) == png(3)
    assert values(pickle.loads(pickle.dumps(source))) == [3, 0, 2]


def test_saved__splits_and_columns(folder):
    spec = f"datasets:{folder}/two,split=train"
    assert values(open_source(spec)) == [0, 1, 2, 3]
    assert open_source(f"{spec},label=number").labels.tolist() == [3, 0, 1, 2]
    named = open_source(f"{spec},label=name,image=stored")
    assert (named.labels.tolist(), named.class_names, values(named)) == ([0, 1, 0, 1], ["x", "y"], [0, 1, 2, 3])
    files = open_source(f"{spec},image=file")
    assert (values(files), files.key(0)) == ([4, 3, 2, 1], "0:../4.png")
    test = open_source(f"datasets:{folder}/two,split=test")
    assert test.labels is None
    assert test.why_no_labels == "1 of 5 rows have none in column 'label', e.g. row 4"
    with pytest.raises(BadImageError, match="the row holds no image"):
        test.load(4)


def test_parquet__with_images(folder):
    source = open_source(f"datasets:{folder}/hub", need_labels=True)
    assert (values(source), source.labels.tolist()) == ([0, 1, 2, 3], [0, 1, 1, 0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("datasets:ROOT/two", "has the splits train, test: name one, as datasets:.*two,split=train"),
        ("datasets:ROOT/two,split=val", "no split val; it has train, test"),
        ("datasets:ROOT/one,split=val", "holds a single split; remove split=val"),
        ("datasets:ROOT/one,label=lable", r"no column label=lable \(did you mean 'label'\?\)"),
        ("datasets:ROOT/one,label=image", "column 'image' holds no labels"),
        ("datasets:ROOT/one,image=number", "column 'number' of type int64 holds no images"),
        ("datasets:ROOT/one,splt=val", "did you mean split="),
        ("datasets:ROOT/none", "is not a folder"),
        ("datasets:", "the folder is missing"),
        ("ROOT/hub", "name a Hugging Face data set as datasets:.*hub"),
        ("datasets:ROOT/bad", "cannot be read as a data set of Hugging Face"),
    ],
)
def test_datasets__faults_are_one_message(folder, spec, message):
    (folder / "bad").mkdir(exist_ok=True)
    (folder / "bad" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=message):
        open_source(spec.replace("ROOT", str(folder)))


def test_datasets__without_the_package(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'mae_et\[datasets\]'"):
        open_source(f"datasets:{folder}/one")
