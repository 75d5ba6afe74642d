"""Folders and generated scenes as image sources, and the words that name a source."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_et.commands.stats import describe
from mae_et.data.decoding import BadImageError
from mae_et.data.sources.folder import FolderSource
from mae_et.data.sources.generated import SceneSource
from mae_et.data.sources.spec import open_source
from mae_et.data.statistics import collect
from mae_et.errors import DataError
from tests.processes import run_command
from tests.unit.shard_files import labelled, make_tar, png, value_of

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_tree(root, paths):
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png(number))


def names(source):
    return [source.name(index) for index in range(len(source))]


# ---- folders ----


def test_folder_source__equals_torchvision_image_folder(tmp_path):
    from torchvision.datasets import ImageFolder

    root = tmp_path / "train"
    paths = ["b/2.png", "b/10.PNG", "a/x/1.png", "a/x-y/1.png", "a/x/z/0.png", "a/9.png", "a/notes.txt", "c é/ü 'q.png"]
    make_tree(root, paths)
    source, oracle = FolderSource(root), ImageFolder(str(root))
    assert [(name, label) for name, label in zip(names(source), source.labels, strict=True)] == oracle.samples
    assert source.class_names == oracle.classes == ["a", "b", "c é"]
    for index, (path, _) in enumerate(oracle.samples):
        assert value_of(source.load(index)) == paths.index(str(Path(path).relative_to(root)))


def test_folder_source__all_extensions_and_nothing_else(tmp_path):
    extensions = [
        "jpg",
        "jpeg",
        "png",
        "bmp",
        "gif",
        "webp",
        "tif",
        "tiff",
        "ppm",
        "pgm",
        "JPG",
        "Jpeg",
        "TIFF",
        "jfif",
    ]
    make_tree(tmp_path / "d", [f"{i:02d}.{extension}" for i, extension in enumerate(extensions)])
    make_tree(tmp_path / "d", ["x.txt", "png", ".hidden.png", ".git/a.png", "__MACOSX/a.png", "x.npy", "x.png.bak"])
    assert [Path(name).suffix[1:] for name in names(FolderSource(tmp_path / "d"))] == extensions


def test_folder_source__labels_only_if_all_lie_in_class_folders(tmp_path):
    make_tree(tmp_path / "d", ["a/1.png", "b/2.png", "3.png"])
    source = open_source(str(tmp_path / "d"))
    assert source.labels is None
    assert source.class_names is None
    assert len(source) == 3
    with pytest.raises(DataError, match=r"1 images lie in the folder itself, e\.g\. 3\.png; move") as caught:
        open_source(str(tmp_path / "d"), need_labels=True)
    assert str(tmp_path / "d") in str(caught.value)
    (tmp_path / "d" / "3.png").unlink()
    assert list(open_source(str(tmp_path / "d"), need_labels=True).labels) == [0, 1]


def test_folder_source__empty_class_folder_keeps_its_number(tmp_path, caplog):
    make_tree(tmp_path / "d", ["a/1.png", "c/2.png"])
    (tmp_path / "d" / "b").mkdir()
    source = FolderSource(tmp_path / "d")
    assert source.class_names == ["a", "b", "c"]
    assert list(source.labels) == [0, 2]
    assert "hold no image: b" in caplog.text


def test_folder_source__links(tmp_path):
    make_tree(tmp_path / "real", ["x/1.png"])
    make_tree(tmp_path / "d", ["a/2.png"])
    root = tmp_path / "d"
    (root / "b").symlink_to(tmp_path / "real", target_is_directory=True)
    (root / "a" / "up").symlink_to(root, target_is_directory=True)
    (root / "a" / "3.png").symlink_to(tmp_path / "real" / "x" / "1.png")
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "a" / "self").symlink_to("self")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "real", target_is_directory=True)
    source = FolderSource(root)
    assert [name.removeprefix(f"{root}/") for name in names(source)] == [
        "a/2.png",
        "a/3.png",
        "a/gone.png",
        "b/x/1.png",
    ]
    assert list(source.labels) == [0, 0, 0, 1]
    assert dict(source.left_out)["links back into a folder that holds them"].count == 2
    with pytest.raises(BadImageError, match="No such file"):
        source.load(2)


def test_folder_source__names_that_are_not_utf8(tmp_path):
    root = tmp_path / "d"
    root.mkdir()
    try:
        (Path(os.fsdecode(os.fsencode(root) + b"/\xff\n.png"))).write_bytes(png(5))
    except OSError:
        pytest.skip("this file system takes no such names")
    assert value_of(FolderSource(root).load(0)) == 5


def test_folder_source__index_out_of_range(tmp_path):
    make_tree(tmp_path / "d", ["1.png"])
    for index in (1, -1):
        with pytest.raises(IndexError):
            FolderSource(tmp_path / "d").load(index)


def test_folder_source__grey(tmp_path):
    make_tree(tmp_path / "d", ["1.png"])
    assert open_source(str(tmp_path / "d"), num_channels=1).load(0).mode == "L"


def test_folder_source__is_small_when_pickled(tmp_path):
    root = tmp_path / "d"
    (root / "class").mkdir(parents=True)
    for number in range(2000):
        (root / "class" / f"{number:06d}.png").touch()
    source = FolderSource(root)
    copy = pickle.loads(pickle.dumps(source))
    assert names(copy) == names(source)
    assert len(pickle.dumps(source)) < 2000 * (len("class/000000.png") + 8 + 8) + 1000


# ---- what the user may get wrong ----


def test_open_source__missing_path_names_what_is_there(tmp_path):
    make_tree(tmp_path, ["train/1.png"])
    with pytest.raises(DataError, match=r"trian does not exist; .* holds: train"):
        open_source(str(tmp_path / "trian"))


def test_open_source__folder_without_images(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    with pytest.raises(DataError, match=r"holds no images.*no files"):
        open_source(str(tmp_path / "d"))
    (tmp_path / "d" / "sub" / "a.npz").touch()
    with pytest.raises(DataError, match=r"holds no images.*\.npz.*name the folder"):
        open_source(str(tmp_path / "d"))


def test_open_source__folder_of_shards_suggests_the_pattern(tmp_path):
    for number in range(12):
        make_tar(tmp_path / f"train-{number:06d}.tar", labelled([number]))
    make_tar(tmp_path / "val.tar", labelled([1]))
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path))
    pattern = f"{tmp_path}/train-{{000000..000011}}.tar"
    assert f"name the shards: {pattern} or {tmp_path}/val.tar" in str(caught.value)
    assert len(open_source(pattern)) == 12


def test_open_source__file_of_another_kind(tmp_path):
    (tmp_path / "list.zip").write_text("a.png")
    with pytest.raises(DataError, match=r"neither a folder nor a list file or table \(\.txt, .*\) nor a tar shard"):
        open_source(str(tmp_path / "list.zip"))


@pytest.mark.parametrize("spec", ["pipe:cat x.tar"])
def test_open_source__streams(spec):
    with pytest.raises(DataError, match="download it"):
        open_source(spec)


def test_open_source__empty_and_channels(tmp_path):
    with pytest.raises(DataError, match="no data given"):
        open_source(" ")
    with pytest.raises(ValueError, match="num_channels is 0"):
        open_source("scenes:3", num_channels=0)
    with pytest.raises(DataError, match=r"has RGB or grey images; set model\.in_chans to 3 or 1, not 2"):
        open_source("scenes:3", num_channels=2)


def test_open_source__home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_tree(tmp_path / "d", ["1.png"])
    assert len(open_source("~/d")) == 1


def test_open_source__missing_shards_are_all_listed(tmp_path):
    for number in (0, 2, 5):
        make_tar(tmp_path / f"t-{number}.tar", labelled([number]))
    with pytest.raises(DataError, match="3 of 6 shards are missing") as caught:
        open_source(str(tmp_path / "t-{0..5}.tar"))
    assert [line[-7:] for line in str(caught.value).splitlines()[1:]] == ["t-1.tar", "t-3.tar", "t-4.tar"]


@pytest.mark.parametrize("pattern", ["x-*.tar", "x-{0..3}.tar", "x.tar"])
def test_open_source__pattern_that_matches_nothing(tmp_path, pattern):
    make_tar(tmp_path / "y-0.tar", labelled([0]))
    with pytest.raises(DataError, match=r"matches no tar shard; .* holds: y-0\.tar"):
        open_source(str(tmp_path / pattern))


def test_open_source__labels_needed_but_shards_have_none(tmp_path):
    path = make_tar(tmp_path / "t.tar", [*labelled([1, 2]), ("x.png", png(3))])
    assert open_source(path).labels is None
    with pytest.raises(DataError, match=r"1 of 3 samples have no class index.*t\.tar:x\.png"):
        open_source(path, need_labels=True)


def test_open_source__shards_without_images(tmp_path):
    path = make_tar(tmp_path / "t.tar", [("a.npz", b"1"), ("a.cls", b"1")])
    with pytest.raises(DataError, match="no images"):
        open_source(path)


# ---- generated scenes ----


def test_scene_source__equals_make_scene():
    from mae_et.data.scenes.painter import SCENE_CLASSES, make_scene

    source = open_source("scenes:4@48x64,seed=3,first=10")
    scenes = [make_scene(10 + index, image_size=(48, 64), seed=3) for index in range(4)]
    for _ in range(2):  # made, then remembered
        for index in (2, 0, 3, 1):
            np.testing.assert_array_equal(np.asarray(source.load(index)), scenes[index].image)
    assert list(source.labels) == [scene.label for scene in scenes]
    assert list(source.class_names) == list(SCENE_CLASSES)
    assert source.name(1) == "scene 11 of seed 3"


def test_scene_source__is_made_once(monkeypatch):
    from mae_et.data.scenes import painter as scenes

    made = []
    original = scenes.make_scene
    monkeypatch.setattr(scenes, "make_scene", lambda index, **options: made.append(index) or original(index, **options))
    source = open_source("scenes:3@32")
    assert len(source.labels) == 3
    assert made == []  # the labels need no pixels
    _ = [source.load(i) for i in (0, 1, 2, 0)]
    assert made == [0, 1, 2]


def test_scene_source__keeps_three_bytes_a_pixel():
    source = open_source("scenes:5@32x40")
    source.load(3)
    assert source._pixels.dtype == np.uint8
    assert source._pixels.nbytes == 5 * 32 * 40 * 3
    assert source._made.tolist() == [False, False, False, True, False]


def test_scene_source__loaded_image_is_a_copy():
    source = open_source("scenes:1@32")
    before = source.load(0)
    source.load(0).paste((0, 0, 0), (0, 0, 32, 32))
    assert source.load(0).tobytes() == before.tobytes()


def test_scene_source__defaults_pickle_and_grey():
    source = open_source("scenes:2", num_channels=1)
    image = source.load(1)
    assert (image.mode, image.size) == ("L", (96, 96))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.load(1).tobytes() == image.tobytes()
    assert len(pickle.dumps(source)) < 2000
    with pytest.raises(IndexError):
        source.load(2)


@pytest.mark.parametrize("spec", ["scenes:", "scenes:0", "scenes:x", "scenes:5@", "scenes:5,sed=1", "scenes:5@96,seed"])
def test_scene_source__grammar_errors(spec):
    with pytest.raises(DataError, match=r"scenes:NUM\[@SIZE\]"):
        open_source(spec)


def test_scene_source__too_small():
    with pytest.raises(DataError, match="at least 32 px"):
        open_source("scenes:5@8")


def test_scene_source__too_many_for_memory_are_made_each_time():
    source = SceneSource(10**9, 32)
    assert source._pixels is None
    np.testing.assert_array_equal(np.asarray(source.load(7)), np.asarray(open_source("scenes:8@32").load(7)))


# ---- tools/dataset_stats.py ----


@pytest.mark.parametrize("num_workers", [0, 2])
def test_dataset_stats__known_pixels(tmp_path, num_workers):
    root = tmp_path / "d"
    for name, colour in (("a/1.png", (255, 0, 51)), ("b/2.png", (0, 0, 51)), ("b/3.png", (0, 0, 51))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 if name[0] == "a" else 20, 30), colour).save(root / name)
    (root / "b" / "bad.png").write_bytes(b"x")
    stats = collect(open_source(str(root)), num_workers=num_workers)
    assert stats["mean"] == pytest.approx([1 / 3, 0, 0.2])
    assert stats["std"] == pytest.approx([2**0.5 / 3, 0, 0])
    assert (stats["num_images"], stats["num_read"], stats["num_bad"]) == (4, 3, 1)
    assert stats["width"] == {"min": 20, "median": 20, "max": 40}
    assert stats["classes"] == {"a": 1, "b": 3}
    assert stats["bad"][0]["name"].endswith("b/bad.png")
    text = describe(stats)
    assert "data=dict(mean=(0.3333, 0.0000, 0.2000), std=(0.4714, 0.0000, 0.0000))" in text
    assert "not a readable image" in text


def test_dataset_stats__max_images_are_spread_evenly(tmp_path):
    make_tree(tmp_path / "d", [f"{i}.png" for i in range(9)])
    stats = collect(open_source(str(tmp_path / "d")), max_images=3)
    assert (stats["num_images"], stats["num_read"]) == (9, 3)
    assert stats["mean"][0] * 255 == pytest.approx(4)  # images 0, 4 and 8


def test_dataset_stats__nothing_readable(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of 1 images can be read; the first is .*bad\.png: not a readable"):
        collect(open_source(str(tmp_path)))


def test_dataset_stats__command_line(tmp_path):
    make_tree(tmp_path / "d", ["a/1.png"])
    done = run_command("stats", "d", "--json", "--num-workers", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["classes"] == {"a": 1}
    done = run_command("stats", "missing", cwd=tmp_path)
    assert done.returncode == 1
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
