"""Cases of image folders and image files: inputs that once gave a wrong result, with the right one."""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import features

from mae_et.data.arrays import ImageArray
from mae_et.data.decoding import BadImageError, decode_image, read_file
from mae_et.data.inspection import inspect_images
from mae_et.data.sources.shard_writer import ShardOptions, write_shards
from mae_et.data.sources.spec import open_source
from mae_et.errors import DataError, printable
from tests.cases.image_files import encode, fill, photo, texts
from tests.conftest import load_tool
from tests.unit.shard_files import labelled, make_tar, png

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path / "cache"))


# ---- kinds of files and folders ----


def test_case__P1_kinds_of_files_are_read_or_counted(tmp_path, caplog):
    files = {f"a/{i}.jpg": encode(photo(i), "JPEG") for i in range(3)}
    read = {"jfif": "JPEG", "jpe": "JPEG", "JFIF": "JPEG", "pnm": "PPM", "dib": "BMP", "apng": "PNG"}
    if features.check("avif"):
        read["avif"] = "AVIF"
    if features.check("jpg_2000"):
        read |= {"jp2": "JPEG2000", "j2k": "JPEG2000"}
    files |= {f"a/x.{suffix}": encode(photo(9), kind) for suffix, kind in read.items()}
    files["a/y.pbm"] = encode(np.eye(8, dtype=bool), "PPM")
    lost = {"a/1.heic": b"heic", "a/2.HEIC": b"heic", "b/3.jxl": b"jxl", "b/4.dng": b"dng"}
    with caplog.at_level(logging.INFO):
        source = open_source(fill(tmp_path / "d", files | lost | {"b/notes.txt": b"x", "b/README": b"x"}))
    assert len(source) == len(files)
    for index in range(len(source)):
        assert source.load(index).mode == "RGB"
    counts = {reason: group.count for reason, group in source.left_out}
    assert counts == {".heic files": 2, ".jxl files": 1, ".dng files": 1, ".txt files": 1, "files without a suffix": 1}
    assert "left out, although they may be images: 1 .dng files (e.g. b/4.dng); 2 .heic files" in caplog.text
    findings = inspect_images(source)
    assert any("left out 2 .heic files" in text and "convert them" in text for text in texts(findings, "warning"))
    assert any("left out 1 .txt files" in text for text in texts(findings, "count"))


def test_case__P1_only_other_kinds(tmp_path):
    with pytest.raises(DataError, match=r"holds no images .*: it holds 2 \.heic files \(e\.g\. .\.heic\); name"):
        open_source(fill(tmp_path / "d", {"a.heic": b"x", "b.heic": b"x"}))


def test_case__P6_side_folders_are_left_out_and_counted(tmp_path):
    side = ["@eaDir", "#recycle", "$RECYCLE.BIN", "$Recycle.Bin", "lost+found", "System Volume Information", ".Trashes"]
    side += ["@Recycle", "#snapshot", "__MACOSX"]
    files = {"cat/1.png": png(1), "dog/2.png": png(2), "dog/@eaDir/2.png/thumb.png": png(3), "dog/._2.png": b"x"}
    source = open_source(fill(tmp_path / "d", files | {f"{name}/x.png": png(4) for name in side}))
    assert source.class_names == ["cat", "dog"]
    assert len(source) == 2
    assert sum(group.count for _, group in source.left_out) == len(side) + 2
    counted = " ".join(texts(inspect_images(source), "count"))
    assert "@eaDir entries, e.g." in counted
    assert "hidden entries" in counted


def test_case__P6_side_folder_that_cannot_be_read(tmp_path):
    fill(tmp_path / "d", {"cat/1.png": png(1), "lost+found/x.png": png(1)})
    (tmp_path / "d" / "lost+found").chmod(0)
    assert len(open_source(str(tmp_path / "d"))) == 1
    (tmp_path / "d" / "lost+found").chmod(0o700)


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "val"),
        ("train", "validation", "test"),
        ("images", "masks"),
        ("train2017", "val2017"),
        ("images", "labels"),
    ],
)
def test_case__P7_splits_and_kinds_taken_for_classes(tmp_path, folders):
    files = {f"{folder}/{i}.png": encode(photo(i)) for i, folder in enumerate(folders)}
    found = texts(inspect_images(open_source(fill(tmp_path / "d", files))), "warning")
    named = [text for text in found if "are taken for classes" in text]
    assert len(named) == 1
    assert all(folder in named[0] for folder in folders)


@pytest.mark.parametrize("classes", [("train", "car", "bus"), ("apple", "mask"), ("cat", "dog")])
def test_case__P7_classes_that_sound_like_a_split_are_none(tmp_path, classes):
    files = {f"{folder}/{i}.png": encode(photo(i)) for i, folder in enumerate(classes)}
    findings = inspect_images(open_source(fill(tmp_path / "d", files)))
    assert not any("taken for classes" in text for text in texts(findings, "warning"))


@pytest.mark.parametrize("names", ["{i}_mask.png", "masks/{i}.png", "sub/SegmentationClass/{i}.png"])
def test_case__P7_masks_among_images(tmp_path, names):
    rng = np.random.default_rng(0)
    files = {f"x/{i}.png": encode(photo(i)) for i in range(4)}
    masks = {f"x/{names.format(i=i)}": encode(rng.integers(0, 5, (40, 48), dtype=np.uint8)) for i in range(4)}
    found = texts(inspect_images(open_source(fill(tmp_path / "d", files | masks))), "warning")
    assert any("label maps" in text and "name only the folder" in text for text in found)
    assert not any(
        "label maps" in t for t in texts(inspect_images(open_source(fill(tmp_path / "e", files))), "warning")
    )


def test_case__P11_validation_equal_to_training(tmp_path):
    root = fill(tmp_path / "d", {f"{'ab'[i % 2]}/{i}.png": encode(photo(i)) for i in range(6)})
    (tmp_path / "link").symlink_to(root)
    for other in (root, str(tmp_path / "link"), f"{root}/../d"):
        found = texts(inspect_images(open_source(root), open_source(other)), "warning")
        assert any("6 of 6 validation images are also training images" in text for text in found), found


def test_case__P11_overlap_by_content(tmp_path):
    train = {f"{'ab'[i % 2]}/{i}.png": encode(photo(i)) for i in range(20)}
    val = {f"{'ab'[i % 2]}/other-{i}.png": encode(photo(i + 17)) for i in range(8)}
    sources = [open_source(fill(tmp_path / name, files)) for name, files in (("t", train), ("v", val))]
    found = texts(inspect_images(*sources), "warning")
    assert any("3 of 8 sampled validation images have the content of a training image" in text for text in found)
    shard = make_tar(tmp_path / "v.tar", [*labelled(range(3)), ("x.png", train["a/4.png"])])
    found = texts(inspect_images(sources[0], open_source(shard)), "warning")
    assert any("1 of 4 sampled" in text and "v.tar:x.png" in text for text in found)
    apart = open_source(fill(tmp_path / "w", {f"{'ab'[i % 2]}/{i}.png": encode(photo(50 + i)) for i in range(8)}))
    assert not any("overlap" in text for text in texts(inspect_images(sources[0], apart), "warning"))


def test_case__P11_generated_scenes_that_overlap():
    found = inspect_images(open_source("scenes:20@32,seed=1"), open_source("scenes:10@48,seed=1,first=15"))
    assert any("5 of 10 validation images" in text for text in texts(found, "warning"))
    found = inspect_images(open_source("scenes:20@32,seed=1"), open_source("scenes:10@48,seed=1,first=20"))
    assert texts(found, "warning") == []


def test_case__P12_share_of_enlarged_images(tmp_path):
    files = {f"{i}.png": encode(photo(i, (360, 400) if i < 3 else (600, 520))) for i in range(4)}
    source = open_source(fill(tmp_path / "d", files))
    (text,) = texts(inspect_images(source, image_size=512), "warning")
    assert "3 of 4 images (75%) have a shorter side below 512 px and are enlarged" in text
    assert not any(
        "enlarged" in t for s in ("warning", "count") for t in texts(inspect_images(source, image_size=224), s)
    )


def test_case__P12_the_sample_is_stated(tmp_path):
    source = open_source(fill(tmp_path / "d", {f"{i}.png": encode(photo(i)) for i in range(9)}))
    (text,) = texts(inspect_images(source, image_size=64, num_sampled=4), "warning")
    assert "4 of 4 sampled images (100%)" in text


def test_inspect_images__duplicate_classes(tmp_path):
    files = {f"{name}/1.png": encode(photo(1)) for name in ("Cat", "cat", "caf\u00e9", "cafe\u0301", "dog")}
    (text,) = [
        t for t in texts(inspect_images(open_source(fill(tmp_path / "d", files))), "warning") if "class names" in t
    ]
    assert "2 class names" in text
    assert "'Cat' = 'cat'" in text


def test_inspect_images__different_classes_are_an_error(tmp_path):
    sources = [open_source(fill(tmp_path / name, {f"{name}/1.png": encode(photo(i))})) for i, name in enumerate("ab")]
    findings = inspect_images(*sources)
    assert findings.to_dict()["error"][0]["kind"] == "class_maps"
    with pytest.raises(DataError, match="only in train: a; only in val: b"):
        findings.raise_errors()


def test_inspect_images__clean_data_has_no_finding_and_json_holds(tmp_path):
    files = {f"{'ab'[i % 2]}/{i}.png": encode(photo(i)) for i in range(6)}
    findings = inspect_images(open_source(fill(tmp_path / "d", files)), image_size=32)
    assert json.loads(json.dumps(findings.to_dict())) == {"error": [], "warning": [], "count": []}


# ---- hostile files and names ----


@pytest.mark.parametrize("name", [b"caf\xe9", b"\x1b[31mred", b"two\nlines", "\u202etxt".encode(), "日本 é".encode()])
def test_case__F9_odd_names_are_shown_escaped_and_kept_exactly(tmp_path, name, capsys):
    root = os.fsencode(tmp_path / "d")
    os.makedirs(root + b"/" + name)
    os.makedirs(root + b"/b")
    for folder in (name, b"b"):
        Path(os.fsdecode(root + b"/" + folder + b"/" + name + b".png")).write_bytes(encode(photo()))
    Path(os.fsdecode(root + b"/b/" + name + b".heic")).write_bytes(b"x")
    source = open_source(str(tmp_path / "d"))
    shown = [*source.class_names, *map(source.name, range(2)), source.left_out.describe()]
    shown += texts(inspect_images(source), "warning")
    for text in shown:
        assert text.isprintable()
        text.encode()
    assert sorted(os.fsencode(source.key(i)) for i in range(2)) == sorted(
        [name + b"/" + name + b".png", b"b/" + name + b".png"]
    )
    assert source.load(0).size == source.load(1).size == (48, 40)
    # C5: the tool writes the classes and the list of sources, and the shards have the same classes.
    tool = load_tool("prepare_data")
    tool.main(tool.make_parser().parse_args([str(tmp_path / "d"), str(tmp_path / "out"), "--processes", "1"]))
    assert "use: --cfg-options" in capsys.readouterr().out
    written = open_source(str(tmp_path / "out" / "train-000000.tar"), need_labels=True)
    assert written.class_names == source.class_names
    listed = [json.loads(line) for line in (tmp_path / "out" / "train-sources.jsonl").read_text().splitlines()]
    assert [os.fsencode(line) for line in listed] == [os.fsencode(source.key(i)) for i in range(2)]


def test_case__C5_class_folder_that_is_not_utf8_matches_itself(tmp_path):
    sources = []
    for split in ("train", "val"):
        folder = os.fsencode(tmp_path / split) + b"/caf\xe9"
        os.makedirs(folder)
        Path(os.fsdecode(folder + b"/1.png")).write_bytes(encode(photo(len(split))))
        sources.append(open_source(str(tmp_path / split), need_labels=True))
    assert sources[0].class_names == ["caf\\xe9"]
    assert inspect_images(*sources).to_dict()["error"] == []


def test_printable__escapes():
    assert printable("a b/é.png") == "a b/é.png"
    assert printable("a\x1b[0m\n\udce9\u202e") == "a\\x1b[0m\\n\\xe9\\u202e"


def test_case__F14_fifo_and_devices_are_skipped_and_counted(tmp_path):
    root = Path(fill(tmp_path / "d", {"a/1.png": png(1), "b/2.png": png(2)}))
    os.mkfifo(root / "a" / "pipe.png")
    (root / "b" / "null.jpg").symlink_to("/dev/null")
    (root / "b" / "gone.jpg").symlink_to("nowhere")
    source = open_source(str(root))
    assert len(source) == 3  # the dangling link is a missing image
    ((reason, group),) = source.left_out
    assert "not regular files" in reason
    assert group.count == 2
    assert group.is_loss


def test_case__F14_file_that_becomes_a_fifo(tmp_path):
    root = Path(fill(tmp_path / "d", {"1.png": png(1)}))
    source = open_source(str(root))
    (root / "1.png").unlink()
    os.mkfifo(root / "1.png")
    results = []

    def load():
        try:
            source.load(0)
        except BadImageError as error:
            results.append(str(error))

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(10)
    assert results == ["not a regular file (a FIFO, device or folder)"]
    with pytest.raises(BadImageError, match="Is a directory"):
        read_file(root)


def test_case__F15_pixel_limit_is_a_setting(tmp_path):
    bomb = encode(np.zeros((9000, 9000), bool))  # 81 million pixels in some ten kilobytes
    assert len(bomb) < 400_000
    with pytest.raises(BadImageError, match=r"9000 x 9000 px is above the limit of 67108864 .* data\.max_image_pixels"):
        decode_image(bomb)
    root = fill(tmp_path / "d", {"1.png": encode(photo()), "2.png": bomb})
    source = open_source(root, max_image_pixels=1919)
    with pytest.raises(BadImageError, match="limit of 1919"):
        source.load(0)
    assert any("2 of 2 images cannot be read" in text for text in texts(inspect_images(source), "warning"))
    with pytest.raises(ValueError, match="max_image_pixels is 0"):
        open_source(root, max_image_pixels=0)


def test_case__F15_limit_holds_for_fast_loading(tmp_path):
    from mae_et.data.buffers import BatchBuffers
    from mae_et.data.stream import Draw, _StreamDataset, _Task
    from mae_et.data.transforms import TrainTransform

    root = fill(tmp_path / "d", {"1.jpg": encode(photo(), "JPEG")})
    stream = _StreamDataset(
        open_source(root, max_image_pixels=100), TrainTransform(16), 0, "fast", BatchBuffers(1, 1, False)
    )
    batch = stream.prepare(_Task([Draw(0, 0, 0.0, (16, 16))], None))
    assert "above the limit of 100" in batch.bad_images[0].reason


def test_case__M10_labels_are_optional(tmp_path):
    root = fill(tmp_path / "d", {"1.png": png(1), "2.png": png(2)})
    command = [sys.executable, "tools/prepare_data.py", root, str(tmp_path / "out"), "--processes", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Pre-training needs no labels" in done.stdout


def test_write_shards__keeps_deep_images_readable_by_the_same_range(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (40, 40), dtype=np.uint16)
    small, large = encode(values), encode(np.kron(values, np.ones((4, 4), np.uint16)))
    source = open_source(fill(tmp_path / "d", {"1.png": small, "2.png": large}), value_range=(0, 4095))
    write_shards(source, tmp_path / "out", "train", ShardOptions(64, images_per_shard=10))
    written = open_source(str(tmp_path / "out" / "train-000000.tar"), value_range=(0, 4095))
    for index in range(2):
        image = written.load(index)
        assert isinstance(image, ImageArray)
        assert image.read().mean() == pytest.approx(0.5, abs=0.02)
