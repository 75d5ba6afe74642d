"""Tar shards as an image source, checked against tarfile and webdataset."""

import gzip
import io
import json
import logging
import multiprocessing
import os
import pickle
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_et.data.decoding import BadImageError
from mae_et.data.sources import cache as cache_module
from mae_et.data.sources import shard_cache, shards
from mae_et.data.sources.spec import open_source
from mae_et.errors import DataError
from tests.unit.shard_files import labelled, make_tar, png, value_of

REPOSITORY = Path(__file__).resolve().parents[2]
CIFAR = REPOSITORY.parent / "shared" / "data" / "cifar10"
needs_cifar = pytest.mark.skipif(not CIFAR.is_dir(), reason="../shared/data/cifar10 is absent")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def names(source):
    return [source.name(index) for index in range(len(source))]


def webdataset_samples(paths):
    import webdataset

    return list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz"])
def test_shard_source__equals_webdataset(tmp_path, format, suffix):
    long = "folder/" * 12 + "n" * 90 if format != tarfile.USTAR_FORMAT else "folder/deep"
    mode = "w" if suffix == "tar" else "w:gz"
    members = [[*labelled(range(5)), ("a/b.c/x.seg.png", png(99)), ("a/b.c/x.PNG", png(60)), ("a/b.c/x.cls", b" 2\n")]]
    members.append(
        [(f"{long}é.json", b'{"label": 1}'), (f"{long}é.png", png(300)), ("s0001.png", png(7)), ("s0001.cls", b"0")]
    )
    paths = [make_tar(tmp_path / f"t-{i}.{suffix}", content, mode, format) for i, content in enumerate(members)]
    source = open_source(str(tmp_path / f"t-{{0..1}}.{suffix}"), need_labels=True)
    oracle = webdataset_samples(paths)
    assert len(source) == len(oracle) == 8
    for index, sample in enumerate(oracle):
        assert source.load(index).tobytes() == Image.open(io.BytesIO(sample["png"])).convert("RGB").tobytes()
        label = int(sample["cls"]) if "cls" in sample else json.loads(sample["json"])["label"]
        assert source.labels[index] == label
        assert source.name(index).lower() == f"{sample['__url__']}:{sample['__key__']}.png".lower()


def test_shard_source__random_order_and_several_handles(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_MAX_OPEN_SHARDS", 2)
    for shard in range(5):
        make_tar(tmp_path / f"t-{shard}.tar", labelled(range(shard * 10, shard * 10 + 10)))
    source = open_source(str(tmp_path / "t-*.tar"))
    for index in np.random.default_rng(0).permutation(50):
        assert value_of(source.load(int(index))) == index
        assert len(source._handles) <= 2


def test_shard_source__members_of_a_sample_apart(tmp_path):
    apart = sorted(labelled(range(4)), key=lambda member: member[0][-3:])
    source = open_source(make_tar(tmp_path / "t.tar", apart), need_labels=True)
    assert [value_of(source.load(i)) for i in range(4)] == [0, 1, 2, 3]
    assert list(source.labels) == [0, 1, 2, 0]


def test_shard_source__labels_from_json_and_what_is_no_label(tmp_path):
    kinds = [b'{"cls": 4}', b'{"label": "3", "cls": 4}', b'{"label": 0}']
    members = [pair for i, text in enumerate(kinds) for pair in ((f"{i}.png", png(i)), (f"{i}.json", text))]
    assert list(open_source(make_tar(tmp_path / "a.tar", members)).labels) == [4, 3, 0]
    for number, text in enumerate(
        [b"{}", b"[1]", b"{broken", b'{"label": true}', b'{"label": null}', b'{"label": -1}']
    ):
        path = make_tar(tmp_path / f"b{number}.tar", [("x.png", png(1)), ("x.json", text)])
        assert open_source(path).labels is None
    assert open_source(make_tar(tmp_path / "c.tar", [("x.png", png(1)), ("x.cls", b"cat")])).labels is None


def test_shard_source__ignores_what_is_no_sample(tmp_path):
    members = [
        ("._s.png", b"x"),
        ("__MACOSX/s.png", b"x"),
        ("__meta__/s.png", b"x"),
        ("only.cls", b"1"),
        *labelled([3]),
    ]
    path = make_tar(tmp_path / "t.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "s0003.png"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    source = open_source(path)
    assert names(source) == [f"{path}:s0003.png", f"{path}:link.png"]
    assert source.read(0) == source.read(1)
    assert source.labels is None  # the link has no label of its own
    assert dict(source.left_out)["hidden entries"].count == 1


def test_shard_source__class_names_beside_the_shards(tmp_path):
    path = make_tar(tmp_path / "t.tar", labelled(range(3)))
    assert open_source(path).class_names is None
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    assert open_source(path).class_names == ["cat", "dog", "bird"]
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"class index 2, but .*classes\.txt names only 2"):
        open_source(path)


def test_shard_source__bad_image_inside(tmp_path):
    source = open_source(make_tar(tmp_path / "t.tar", [("a.png", png(1)[:40]), ("b.jpg", b""), *labelled([2])]))
    for index in (0, 1):
        with pytest.raises(BadImageError):
            source.load(index)
    assert value_of(source.load(2)) == 2


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_shard_source__second_open_uses_the_cached_index(tmp_path, monkeypatch, cache, suffix):
    path = make_tar(tmp_path / f"t.{suffix}", labelled(range(6)), "w" if suffix == "tar" else "w:gz")
    first = open_source(path)
    assert sorted(file.suffix for file in cache.iterdir()) == (
        [".index", ".lock", ".lock", ".npz"] + ([".tar"] if suffix == "tar.gz" else [])
    )

    def must_not_run(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(shard_cache, "index_tar", must_not_run)
        patch.setattr(shard_cache, "_gunzip", must_not_run)
        second = open_source(path)
    assert names(second) == names(first)
    assert list(second.labels) == list(first.labels) == [0, 1, 2, 0, 1, 2]
    assert [value_of(second.load(i)) for i in range(6)] == list(range(6))

    make_tar(path, labelled(range(10, 14)), "w" if suffix == "tar" else "w:gz")  # a changed shard is read again
    assert [value_of(open_source(path).load(i)) for i in range(4)] == [10, 11, 12, 13]


def test_shard_source__damaged_cache_is_made_again(tmp_path, cache):
    path = make_tar(tmp_path / "t.tar.gz", labelled(range(6)), "w:gz")
    open_source(path)
    (index,) = cache.glob("*.npz")
    (plain,) = cache.glob("*.tar")
    index.write_bytes(index.read_bytes()[:100])
    assert [value_of(open_source(path).load(i)) for i in range(6)] == list(range(6))
    plain.write_bytes(plain.read_bytes()[:3000])
    assert [value_of(open_source(path).load(i)) for i in range(6)] == list(range(6))


def test_shard_source__pickle_and_fork(tmp_path):
    source = open_source(make_tar(tmp_path / "t.tar", labelled(range(40))))
    source.load(0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy._handles == {}
    assert value_of(copy.load(39)) == 39
    from torch.utils.data import DataLoader, Dataset

    class Values(Dataset):
        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            return value_of(source.load(index))

    for _ in range(2):  # forked with an open handle
        found = [int(v) for v in DataLoader(Values(), batch_size=None, num_workers=2, multiprocessing_context="fork")]
        assert found == list(range(40))
    assert value_of(source.load(5)) == 5


def _open_at(barrier, path, queue):
    barrier.wait()
    source = open_source(path)
    queue.put([value_of(source.load(i)) for i in range(len(source))])


def no_locks(*_, **__):
    raise OSError(38, "Function not implemented")


@pytest.mark.parametrize("locks", [True, False])
def test_shard_source__two_processes_decompress_at_once(tmp_path, monkeypatch, cache, locks):
    if not locks:
        monkeypatch.setattr(cache_module.FileLock, "acquire", no_locks)
    path = make_tar(tmp_path / "t.tar.gz", labelled(range(300)), "w:gz")
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_open_at, args=(barrier, path, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results == [list(range(300))] * 4
    assert sorted(file.suffix for file in cache.iterdir() if file.suffix != ".lock") == [".index", ".npz", ".tar"]


def test_shard_source__one_process_indexes_and_the_others_wait(tmp_path, monkeypatch, cache):
    """Each process writes down which shards it indexed, slowly: together they index each shard once."""
    paths = [make_tar(tmp_path / f"t-{i}.tar", labelled(range(3 * i, 3 * i + 3))) for i in range(4)]
    original = shard_cache.index_tar

    def slow(path, shown):
        time.sleep(0.2)
        with (tmp_path / "indexed").open("a") as file:
            file.write(f"{path.name}\n")
        return original(path, shown)

    monkeypatch.setattr(shard_cache, "index_tar", slow)
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    pattern = str(tmp_path / "t-{0..3}.tar")
    processes = [context.Process(target=_open_at, args=(barrier, pattern, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results == [list(range(12))] * 3
    assert sorted((tmp_path / "indexed").read_text().split()) == [Path(path).name for path in paths]
    assert (
        len(list(cache.glob("*.lock"))) == 5
    )  # of each shard and of all; they stay, because a process may wait on one


def test_shard_source__leftover_of_a_killed_process_is_removed(tmp_path, cache):
    path = make_tar(tmp_path / "t.tar.gz", labelled(range(3)), "w:gz")
    open_source(path)
    (plain,) = cache.glob("*.tar")
    leftover = plain.with_name(f"{plain.name}.abc.partial")
    plain.rename(leftover)
    assert len(open_source(path)) == 3
    assert not leftover.exists()
    assert plain.exists()


def test_shard_source__says_what_it_decompresses(tmp_path, caplog, cache):
    path = make_tar(tmp_path / "t.tar.gz", labelled(range(3)), "w:gz")
    with caplog.at_level(logging.INFO):
        open_source(path)
    assert "decompressing 1 shards" in caplog.text
    assert path in caplog.text
    assert str(cache) in caplog.text
    assert "MB" in caplog.text


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_shard_source__cut_off_anywhere(tmp_path, cache, suffix):
    whole = Path(make_tar(tmp_path / "whole.tar", labelled(range(6)))).read_bytes()
    end = 12 * 1024  # 12 members of 1024 bytes; what follows are zeros
    cuts = [1, 300, 512, 600, 1024, 1100, 2048, end - 512, end]
    if suffix == "tar.gz":
        whole = gzip.compress(np.random.default_rng(0).bytes(5000))
        cuts = [2, 5, 15, 2000, len(whole) - 9, len(whole) - 1]
    for number, cut in enumerate(cuts):
        path = tmp_path / f"{number}.{suffix}"
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"is cut off or damaged .*; download or copy it again") as caught:
            open_source(str(path))
        assert str(path) in str(caught.value)
    assert {file.suffix for file in cache.iterdir()} <= {".lock"}


def test_shard_source__damage_in_the_middle(tmp_path):
    path = Path(make_tar(tmp_path / "t.tar", labelled(range(6))))
    content = bytearray(path.read_bytes())
    content[4096 : 4096 + 512] = b"x" * 512
    path.write_bytes(content)
    with pytest.raises(DataError, match="no end mark at byte 4096"):
        open_source(str(path))


def test_shard_source__cut_tar_inside_whole_gzip(tmp_path, cache):
    plain = Path(make_tar(tmp_path / "t.tar", labelled(range(6)))).read_bytes()
    path = tmp_path / "t.tar.gz"
    path.write_bytes(gzip.compress(plain[:3000]))
    with pytest.raises(DataError, match=r"t\.tar\.gz is cut off"):
        open_source(str(path))
    assert {file.suffix for file in cache.iterdir()} <= {".lock"}


def test_shard_source__gzip_by_content_not_by_name(tmp_path):
    path = make_tar(tmp_path / "t.tar", labelled(range(3)), "w:gz")
    assert value_of(open_source(path).load(2)) == 2


def test_shard_source__cache_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path / "file" / "cache"))
    packed = make_tar(tmp_path / "t.tar.gz", labelled(range(3)), "w:gz")
    with pytest.raises(DataError, match=r"cannot take it .*set MAE_ET_CACHE to"):
        open_source(packed)
    assert len(open_source(make_tar(tmp_path / "u.tar", labelled(range(3))))) == 3  # plain tars only lose the index
    assert "MAE_ET_CACHE" in caplog.text


def test_shard_source__full_disk(tmp_path, monkeypatch, cache):
    packed = make_tar(tmp_path / "t.tar.gz", labelled(range(3)), "w:gz")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left on device.*MAE_ET_CACHE"):
        open_source(packed)
    assert {file.suffix for file in cache.iterdir()} <= {".lock"}


def test_shard_source__shard_that_shrinks_later(tmp_path):
    path = make_tar(tmp_path / "t.tar", labelled(range(3)))
    source = open_source(path)
    os.truncate(path, 600)
    with pytest.raises(BadImageError, match="the shard changed"):
        source.load(2)


@needs_cifar
def test_shard_source__cifar_equals_tarfile_and_webdataset():
    source = open_source(str(CIFAR / "test-000000.tar.gz"), need_labels=True)
    assert len(source) == 10000
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert source.class_names[0] == "airplane"
    oracle = webdataset_samples([CIFAR / "test-000000.tar.gz"])
    assert [int(sample["cls"]) for sample in oracle] == list(source.labels)
    assert [f"{s['__url__']}:{s['__key__']}.jpg" for s in oracle] == names(source)
    with tarfile.open(CIFAR / "test-000000.tar.gz") as tar:
        for index in range(0, 10000, 997):
            content = tar.extractfile(f"{oracle[index]['__key__']}.jpg").read()
            assert content == oracle[index]["jpg"]
            assert source.load(index).tobytes() == Image.open(io.BytesIO(content)).convert("RGB").tobytes()
