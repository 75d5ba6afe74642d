"""List files and tables as image sources."""

import os
import pickle

import numpy as np
import pytest

from mae_et.data.inspection import inspect_images
from mae_et.data.sources import table_listing
from mae_et.data.sources.shard_writer import ShardOptions, write_shards
from mae_et.data.sources.spec import open_source
from mae_et.data.sources.table_listing import encode_labels
from mae_et.errors import DataError
from tests.unit.shard_files import png, value_of

IMAGES = ["a/0.png", "a/1 b.png", "b/2.png"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path / "cache"))
    for number, path in enumerate(IMAGES):
        (tmp_path / "set" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / path).write_bytes(png(number))
    return tmp_path / "set"


def write(folder, name, content):
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    return str(folder / name)


def values(source):
    return [value_of(source.load(index)) for index in range(len(source))]


@pytest.mark.parametrize(
    ("name", "content", "labels", "class_names"),
    [
        ("l.txt", "b/2.png\na/1 b.png\n", None, None),
        ("l.txt", "b/2.png 7\n\n  a/1 b.png   0 \r\n", [7, 0], None),
        ("l.txt", "\ufeffb/2.png\tdog x\na/1 b.png\tcat\n", [1, 0], ["cat", "dog x"]),
        ("l.txt", "b/2.png\t3\na/1 b.png\t4\n", [3, 4], None),
        ("l.csv", 'path,extra,label\n"b/2.png","1,5",10\na/1 b.png,,9\n', [10, 9], None),
        ("l.TSV", "label \t path\nNA\tb/2.png\n1\ta/1 b.png\n", [1, 0], ["1", "NA"]),
        ("l.csv", "path\nb/2.png\na/1 b.png\n", None, None),
    ],
)
def test_table__forms(folder, name, content, labels, class_names):
    source = open_source(write(folder, name, content))
    assert values(source) == [2, 1]
    assert [source.key(i) for i in range(2)] == ["b/2.png", "a/1 b.png"]
    assert source.name(0) == f"{folder}/b/2.png"
    assert (source.labels is None) == (labels is None)
    assert labels is None or source.labels.tolist() == labels
    assert source.class_names == class_names


def test_table__options_name_root_and_columns(folder, tmp_path, monkeypatch):
    file = write(tmp_path, "t.csv", "file,n,name\nb/2.png,0,dog\na/0.png,1,cat\n")
    assert open_source(f"{file},root={folder},path=file,label=n").labels.tolist() == [0, 1]
    assert open_source(f"{file},label=name,path=file,root={folder}").class_names == ["cat", "dog"]
    monkeypatch.chdir(tmp_path)
    assert open_source("t.csv,path=file,root=set").labels is None
    absolute = write(tmp_path, "absolute.txt", f"{folder}/a/0.png\n")
    assert values(open_source(f"{absolute},root=/")) == [0]


def test_table__parquet(folder):
    pytest.importorskip("pyarrow")
    import pandas as pd

    def write_parquet(**columns):
        pd.DataFrame(columns).to_parquet(folder / "t.parquet")
        return open_source(str(folder / "t.parquet"))

    assert write_parquet(path=IMAGES, label=[2, 0, 1]).labels.tolist() == [2, 0, 1]
    assert write_parquet(path=IMAGES, label=pd.Categorical(["x", "y", "x"])).class_names == ["x", "y"]
    source = write_parquet(path=IMAGES, label=[2, None, 1])  # float64, as pandas writes integers with gaps
    assert source.labels is None
    assert source.why_no_labels == f"1 of 3 entries have none, e.g. {folder}/a/1 b.png"
    with pytest.raises(DataError, match=r"column 'path' holds .*, not paths.*datasets:FOLDER"):
        write_parquet(path=[b"x", b"y", b"z"])
    with pytest.raises(DataError, match=r"neither names nor whole numbers: 0\.5; name another column"):
        write_parquet(path=IMAGES, label=[0.5, 1, 2])
    (folder / "t.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="damaged or not a parquet file"):
        open_source(str(folder / "t.parquet"))


def test_table__parquet_without_pyarrow(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"without pyarrow: pip install 'mae_et\[datasets\]'"):
        open_source(write(folder, "t.parquet", "x"))


def test_table__classes_file_fixes_the_order(folder):
    write(folder, "classes.txt", "dog\ncat\nbird\n")
    assert open_source(write(folder, "n.txt", "b/2.png\tcat\na/0.png\tdog\n")).labels.tolist() == [1, 0]
    source = open_source(write(folder, "n.csv", "path,label\nb/2.png,2\na/0.png,0\n"))
    assert (source.labels.tolist(), list(source.class_names)) == ([2, 0], ["dog", "cat", "bird"])
    with pytest.raises(DataError, match=r"1 labels are not among its classes: cta \(did you mean 'cat'\?\)"):
        open_source(write(folder, "n.txt", "b/2.png\tcta\na/0.png\tdog\n"))
    with pytest.raises(DataError, match=r"1 labels exceed the 3 classes, numbered from 0, e\.g\. 3 of a/0\.png"):
        open_source(write(folder, "n.csv", "path,label\nb/2.png,2\na/0.png,3\n"))


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        (
            "l.txt",
            "a/0.png\nx.png 1\ny.png\n" + "z.png\n" * 9,
            r"11 of 12 paths are not files: x\.png, y\.png, .* and 6 more;",
        ),
        ("l.txt", "a\n", r"1 of 1 paths are not files: a; relative paths begin at .*l\.txt,root=FOLDER"),
        ("l.txt", " \n\r\n", "names no images"),
        (
            "l.txt",
            "a/0.png -1\nb/2.png 0\n",
            r"1 labels that are out of range, e\.g\. -1 of a/0\.png; number the classes from 0",
        ),
        ("l.txt", "a/0.png 99999999999\n", r"1 labels that are out of range"),
        ("l.txt", "a/0.png 1\na/0.png 1\na/0.png 2\n", r"lists 1 paths again with another label: a/0\.png"),
        ("l.txt,path=x", "a/0.png\n", "a .txt list has no columns"),
        ("l.txt,root=/no/such", "a/0.png\n", r"root=/no/such is not a folder"),
        ("l.csv,lable=x", "path\na/0.png\n", r"'lable=x' is no option with a value; did you mean label=\?"),
        ("l.csv,label=lable", "path,label\na/0.png,1\n", r"no column 'lable' \(did you mean 'label'\)"),
        (
            "l.csv",
            "file,label\na/0.png,1\n",
            r"no column 'path' \(it has file, label\); name another as .*l\.csv,path=COLUMN",
        ),
        ("l.csv", "path,path\na/0.png,1\n", "has 2 columns 'path'"),
        ("l.csv", "path,label\na/0.png\n", r"1 rows with another number of cells than its header \(2\), e\.g\. row 1"),
        ("l.csv", 'path,label\n"a/0.png,1\n', "cannot be read: unexpected end of data in line 2"),
        ("l.csv", "path,label\n,1\na/0.png,2\n", "1 entries without a path, e.g. number 1"),
    ],
)
def test_table__faults_are_one_message(folder, spec, content, message):
    write(folder, spec.partition(",")[0], content)
    with pytest.raises(DataError, match=message):
        open_source(f"{folder}/{spec}")


def test_table__labels_that_are_missing_are_an_error_where_they_are_needed(folder):
    file = write(folder, "l.csv", "path,label\na/0.png,1\nb/2.png,\n")
    assert open_source(file).labels is None
    with pytest.raises(
        DataError, match=r"no labels.*1 of 2 entries have none, e\.g\. .*b/2\.png; complete that column"
    ):
        open_source(file, need_labels=True)


def test_table__repeated_paths_are_counted(folder, caplog):
    source = open_source(write(folder, "l.txt", "a/0.png 1\nb/2.png 0\na/0.png 1\n"))
    assert values(source) == [0, 2, 0]
    text = "1 of 3 entries repeat the path of another, e.g. a/0.png"
    assert text in caplog.text
    assert [text in item.text for item in inspect_images(source).items if item.kind == "repeated_paths"] == [True]


def test_table__large_listings_are_kept_by_content(folder, monkeypatch):
    file = write(folder, "l.txt", "a/0.png 1\nb/2.png 0\n")
    monkeypatch.setattr(table_listing, "KEPT_FROM", 0)
    first = open_source(file)
    (folder / "b/2.png").unlink()
    kept = open_source(file)  # is not looked up again
    assert (kept.labels.tolist(), kept.key(1)) == (first.labels.tolist(), "b/2.png")
    assert pickle.loads(pickle.dumps(kept)).key(0) == "a/0.png"
    (next((folder.parent / "cache").glob("*.table"))).write_bytes(b"cut")
    with pytest.raises(DataError, match="1 of 2 paths are not files"):  # read again
        open_source(file)
    assert values(open_source(write(folder, "l.txt", "a/1 b.png 5\n"))) == [1]


def test_table__names_of_any_bytes(folder):
    name = os.fsdecode(b"caf\xe9.png")
    (folder / name).write_bytes(png(3))
    source = open_source(write(folder, "l.txt", f"{name}\n"))
    assert values(source) == [3]
    assert source.name(0) == f"{folder}/caf\\xe9.png"


def test_write_shards__images_without_a_suffix_get_that_of_their_content(folder, tmp_path):
    (folder / "a" / "f3").write_bytes(png(5))
    source = open_source(write(folder, "l.txt", "a/f3 1\na/0.png 0\n"))
    write_shards(source, tmp_path / "out", "train", ShardOptions(seed=0), 1, 0.0)
    shards = open_source(f"{tmp_path}/out/train-000000.tar")
    assert sorted(zip(values(shards), shards.labels.tolist(), strict=True)) == [(0, 0), (5, 1)]


def test_encode_labels__independent_reference():
    rng = np.random.default_rng(0)
    labels = [["cat", "ant", "zoo", None, ""][i] for i in rng.integers(0, 5, 50)]
    numbers, names = encode_labels(labels, str, "x")
    assert names == ["ant", "cat", "zoo"]
    assert [names[n] if n >= 0 else None for n in numbers] == [label or None for label in labels]
