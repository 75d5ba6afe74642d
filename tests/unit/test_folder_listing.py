"""The kept listing of a folder: mapped while nothing changed, and made again after any change."""

import logging
import multiprocessing
import os
import time

import numpy as np
import pytest

from mae_et.data.sources import folder_listing
from mae_et.data.sources.folder import FolderSource
from mae_et.data.sources.folder_listing import list_folder
from mae_et.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_listing, "KEPT_FROM", 3)
    monkeypatch.setattr(folder_listing, "_CLOCK_TICK", 20 * 10**6)
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    for i in range(12):
        path = tmp_path / "data" / "abc"[i % 3] / "deep" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "data" / "a" / "notes.txt").touch()
    time.sleep(0.05)  # longer than the tick
    return tmp_path / "data"


@pytest.fixture
def scans(monkeypatch):
    """The roots that were listed, with whether the whole folder was."""
    found, scan = [], folder_listing._scan
    monkeypatch.setattr(
        folder_listing, "_scan", lambda root, limit=None: (limit is None and found.append(root)) or scan(root, limit)
    )
    return found


def keys(listing):
    return [listing[i] for i in range(len(listing))]


def test_list_folder__the_kept_listing_is_mapped_and_equal(root, scans):
    first = list_folder(root)
    second = list_folder(root)
    assert scans == [root]
    assert keys(second) == keys(first) == sorted(keys(first))
    assert len(second) == 12
    assert second.class_names == ["a", "b", "c"]
    assert second.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert second.left_out.to_list() == first.left_out.to_list() == [(".txt files", 1, ["a/notes.txt"], False)]
    assert list(second.folders()) == [("a/deep", 4), ("b/deep", 4), ("c/deep", 4)]
    assert isinstance(second.labels.base.base, np.memmap) or isinstance(second.labels.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        second.labels[0] = 1


def test_list_folder__small_folders_are_not_kept(root, monkeypatch, cache):
    monkeypatch.setattr(folder_listing, "KEPT_FROM", 12)
    assert len(list_folder(root)) == 12
    assert not cache.exists()


def change_add(root):
    (root / "b" / "deep" / "new.png").touch()


def change_remove(root):
    (root / "b" / "deep" / "01.png").unlink()


def change_rename(root):
    (root / "b" / "deep" / "01.png").rename(root / "b" / "deep" / "x.png")


def change_move_to_another_class(root):
    (root / "b" / "deep" / "01.png").rename(root / "a" / "deep" / "01.png")


def change_rename_a_folder(root):
    (root / "b").rename(root / "z")


def change_add_an_empty_folder(root):
    (root / "aa").mkdir()


def change_remove_a_folder(root):
    for path in (root / "c" / "deep").iterdir():
        path.unlink()
    (root / "c" / "deep").rmdir()
    (root / "c").rmdir()


def change_add_and_set_the_time_back(root):
    before = os.stat(root / "b" / "deep")
    change_add(root)
    os.utime(root / "b" / "deep", ns=(before.st_atime_ns, before.st_mtime_ns))


def change_replace_a_folder_of_the_same_times(root):
    old, new = root / "b" / "deep", root / "b" / "new"
    new.mkdir()
    (new / "other.png").touch()
    before, above = os.stat(old), os.stat(root / "b")
    old.rename(root.parent / "old")
    new.rename(old)
    for path, status in ((old, before), (root / "b", above)):
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_file_into_a_folder(root):
    (root / "b" / "deep" / "01.png").unlink()
    (root / "b" / "deep" / "01.png").mkdir()
    (root / "b" / "deep" / "01.png" / "in.png").touch()


CHANGES = [value for name, value in globals().items() if name.startswith("change_")]


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_list_folder__a_change_is_noticed(root, change, monkeypatch):
    before = keys(list_folder(root)), list_folder(root).class_names
    change(root)
    after = keys(list_folder(root)), list_folder(root).class_names
    assert after != before
    monkeypatch.setattr(folder_listing, "KEPT_FROM", 10**9)
    monkeypatch.setenv("MAE_ET_CACHE", str(root.parent / "other"))
    fresh = list_folder(root)
    assert after == (keys(fresh), fresh.class_names)


def test_list_folder__a_folder_that_changed_just_before_is_read_again(root, scans, monkeypatch):
    """A file that is added within the tick of the clock leaves the folder's times as they were."""
    monkeypatch.setattr(folder_listing, "_CLOCK_TICK", 10**12)
    list_folder(root)
    list_folder(root)
    assert len(scans) == 2


def test_list_folder__folder_behind_a_link(root, tmp_path):
    target = tmp_path / "target"
    (target / "deep").mkdir(parents=True)
    (target / "deep" / "1.png").touch()
    (root / "d").symlink_to(target)
    (root / "e").symlink_to(tmp_path / "later")  # broken: as a disk that is not mounted
    time.sleep(0.05)
    assert len(list_folder(root)) == 13
    (target / "deep" / "2.png").touch()
    assert len(list_folder(root)) == 14
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "3.png").touch()
    assert "e/3.png" in keys(list_folder(root))
    time.sleep(0.05)
    list_folder(root)
    (root / "d").unlink()
    (root / "d").symlink_to(tmp_path / "later")
    assert "d/3.png" in keys(list_folder(root))


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "other version", "zeros", "folder"])
def test_list_folder__damaged_listing_is_made_again(root, cache, scans, damage):
    expected = keys(list_folder(root))
    (path,) = cache.glob("*.listing")
    content = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {
                "cut": content[:-10],
                "empty": b"",
                "foreign": b"\x89PNG" * 100,
                "other version": content.replace(b'\\"version\\": 1', b'\\"version\\": 9'),
                "zeros": bytes(len(content)),
            }[damage]
        )
    assert keys(list_folder(root)) == expected
    assert len(scans) == 2


@pytest.mark.skipif(
    os.getuid() == 0 and not os.path.exists("/proc/version"), reason="needs a path that cannot be written"
)
def test_list_folder__cache_that_cannot_be_written_is_a_warning(root, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path / "file" / "cache"))
    assert len(list_folder(root)) == 12
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "the next start makes it again" in record.getMessage()


def test_list_folder__unreadable_folder(root, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder_listing.os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        list_folder(root)


def _open(barrier, root, queue):
    scan = folder_listing._scan

    def slow(path, limit=None):
        if limit is None:
            time.sleep(0.3)
            queue.put("scan")
        return scan(path, limit)

    folder_listing._scan = slow
    barrier.wait()
    queue.put(keys(list_folder(root)))


def test_list_folder__one_process_lists_and_the_others_wait(root, monkeypatch):
    """Also where the folder changed just before: the listing of another process is as new as one's own."""
    monkeypatch.setattr(folder_listing, "_CLOCK_TICK", 10**12)
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_open, args=(barrier, root, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in range(5)]
    for process in processes:
        process.join()
    assert found.count("scan") == 1
    assert [result for result in found if result != "scan"] == [keys(list_folder(root))] * 4


def test_folder_source__from_the_kept_listing(root):
    first, second = FolderSource(root), FolderSource(root)
    assert [second.key(i) for i in range(12)] == [first.key(i) for i in range(12)]
    assert second.name(0) == f"{root}/a/deep/00.png"
    second.read_ahead([3, 1, 11])
    os.unlink(second.name(1))
    second.read_ahead([1])  # `read` reports it
