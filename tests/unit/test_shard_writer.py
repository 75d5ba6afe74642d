"""Writing resized shards: what is inside, stopping and going on, and everything that can be wrong with it."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_et.data.sources import shard_cache, shard_writer
from mae_et.data.sources.shard_writer import ShardOptions, fit_image, shard_pattern, write_shards
from mae_et.data.sources.spec import open_source
from mae_et.errors import DataError, UserError

from .test_jpeg import encode, picture

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = ShardOptions(shorter_side=40, images_per_shard=8)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MAE_ET_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def images(tmp_path):
    """Thirty photos of three classes; in each class the same names."""
    root = tmp_path / "images"
    for i in range(30):
        path = root / ("it's a cat", "日本 köter", "z.v1")[i % 3] / f"n o.{i // 3}'é.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(60 + i, 100 - i, seed=i)))
    return root


def write(images, out, options=OPTIONS, **arguments):
    return write_shards(open_source(str(images)), out, "train", options, **arguments)


def read(out, num_shards):
    return open_source(shard_pattern(out, "train", num_shards), need_labels=True)


def keys(source):
    """The indices of the images before, in the shards' order."""
    return [int(source.name(index).rpartition(":")[2].partition(".")[0]) for index in range(len(source))]


def digest(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_write_shards__same_images_and_labels_resized(images, tmp_path):
    results = write(images, tmp_path / "out", num_processes=2)
    before, after = open_source(str(images)), read(tmp_path / "out", len(results))
    assert len(results) == 4
    assert sorted(keys(after)) == list(range(30))
    assert list(after.class_names) == list(before.class_names) == ["it's a cat", "z.v1", "日本 köter"]
    sources = [json.loads(line) for line in (tmp_path / "out" / "train-sources.jsonl").read_text().splitlines()]
    for place, index in enumerate(keys(after)):
        assert after.labels[place] == before.labels[index]
        assert f"{images}/{sources[index]}" == before.name(index)
        found, original = after.load(place), before.load(index)
        assert min(found.size) == 40
        assert abs(max(found.size) - 40 * max(original.size) / min(original.size)) <= 0.5
        expected = original.resize(found.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(found, float) - np.asarray(expected, float)).mean() < 8
    assert sum(result.num_images for result in results) == 30
    assert [result.tar_bytes for result in results] == [
        (tmp_path / "out" / f"train-{number:06d}.tar").stat().st_size for number in range(4)
    ]


def test_write_shards__webdataset_reads_the_same(images, tmp_path):
    import webdataset

    write(images, tmp_path / "out")
    paths = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    source = read(tmp_path / "out", 4)
    assert [int(sample["__key__"]) for sample in samples] == keys(source)
    assert [int(sample["cls"]) for sample in samples] == list(source.labels)


def test_write_shards__order_follows_the_seed_and_mixes_the_classes(images, tmp_path):
    for number, seed in enumerate((0, 0, 1)):
        write(images, tmp_path / str(number), ShardOptions(40, images_per_shard=8, seed=seed), num_processes=1 + number)
    assert digest(tmp_path / "0") == digest(tmp_path / "1")
    orders = [keys(read(tmp_path / str(number), 4)) for number in (0, 2)]
    assert orders[0] != orders[1]
    assert len(set(read(tmp_path / "0", 4).labels[:8])) == 3
    sizes = [result.num_images for result in write(images, tmp_path / "0")]
    assert max(sizes) - min(sizes) <= 1


def test_write_shards__small_images_are_kept_byte_for_byte(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    contents = {"a.jpg": encode(picture(40, 90)), "b.jpeg": encode(picture(30, 200)), "c.JPG": encode(picture(41, 41))}
    buffer = io.BytesIO()
    Image.new("RGBA", (9, 5), (10, 20, 30, 40)).save(buffer, "PNG")
    contents["d.png"] = buffer.getvalue()
    for name, content in contents.items():
        (root / name).write_bytes(content)
    (result,) = write(root, tmp_path / "out")
    assert (result.num_images, result.num_kept) == (4, 3)
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        stored = {member.name: tar.extractfile(member).read() for member in tar}
    assert {name: stored[name] for name in ("00000000.jpg", "00000001.jpeg", "00000003.png")} == {
        "00000000.jpg": contents["a.jpg"], "00000001.jpeg": contents["b.jpeg"], "00000003.png": contents["d.png"],
    }  # fmt: skip
    assert Image.open(io.BytesIO(stored["00000002.jpg"])).size == (40, 40)
    assert len(stored) == 4  # a flat folder has no labels
    assert shard_pattern(tmp_path, "train", 1) == f"{tmp_path}/train-000000.tar"


def test_fit_image__turned_image_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    content, suffix = fit_image(encode(picture(80, 60), exif=exif), "png", 30, 90)
    assert suffix == "jpg"
    found = Image.open(io.BytesIO(content))
    assert found.size == (30, 40)
    assert 0x0112 not in found.getexif()


def test_fit_image__quality_and_extreme_aspect():
    original = encode(picture(200, 100))
    sizes = [len(fit_image(original, "jpg", 50, quality)[0]) for quality in (30, 70, 95)]
    assert sizes == sorted(set(sizes))
    thin = encode(Image.new("L", (1, 3000)))
    assert fit_image(thin, "jpg", 50, 90) == (thin, "jpg")
    content, _ = fit_image(encode(Image.new("L", (3, 6000))), "jpg", 1, 90)
    assert Image.open(io.BytesIO(content)).size == (1, 2000)


def test_write_shards__resumes_where_it_was_stopped(images, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    write(images, whole)

    class Stop(Exception):
        pass

    manifest = out / "train-manifest.json"

    def stop_after_one(handled):
        if manifest.exists() and json.loads(manifest.read_text())["shards"]:
            raise Stop

    with pytest.raises(Stop):
        write(images, out, progress=stop_after_one)
    assert not list(out.glob("*.partial"))
    done = json.loads(manifest.read_text())["shards"]
    assert 1 <= len(done) < 4
    times = {number: (out / f"train-{int(number):06d}.tar").stat().st_mtime_ns for number in done}
    handled = []
    write(images, out, progress=handled.append)
    assert handled[0] == sum(result["num_images"] for result in done.values())
    assert sum(handled) == 30
    assert {number: (out / f"train-{int(number):06d}.tar").stat().st_mtime_ns for number in done} == times
    assert digest(out) == digest(whole)


def tool(*words, **options):
    command = [sys.executable, str(REPOSITORY / "tools" / "prepare_data.py"), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", **options)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_prepare_data__killed_in_the_middle_resumes(images, tmp_path, number):
    for i in range(170):
        (images / "z.v1" / f"more{i}.jpg").write_bytes(encode(picture(700, 500, seed=i % 3)))
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ("--shorter-side", 40, "--images-per-shard", 8, "--processes", 1)
    process = tool(images, out, *options, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in errors
    assert 0 < len(list(out.glob("*.tar"))) < 25
    assert not (number == signal.SIGINT and list(out.glob("*.partial")))
    (out / "train-000024.tar.0.partial").write_bytes(b"left over")
    for folder in (out, whole):
        process = tool(images, folder, *options)
        text, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "200 images in 25 shards" in text
        assert f"data.train={folder}/train-{{000000..000024}}.tar" in text
    assert digest(out) == digest(whole)


def test_write_shards__damaged_shard_is_written_again(images, tmp_path):
    out = tmp_path / "out"
    write(images, out)
    expected = digest(out)
    cut = out / "train-000002.tar"
    cut.write_bytes(cut.read_bytes()[:-12000])
    with pytest.raises(DataError, match=r"train-000002\.tar is cut off or damaged"):
        read(out, 4)
    (out / "train-000001.tar").unlink()
    write(images, out)
    assert digest(out) == expected


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"shorter_side": 41}, "shorter_side was 40, is 41"),
        ({"quality": 80}, "quality was 95, is 80"),
        ({"seed": 5}, "seed was 0, is 5"),
        ({"images_per_shard": 9}, "images_per_shard was 8, is 9"),
    ],
)
def test_write_shards__other_options_are_refused(images, tmp_path, changed, shown):
    write(images, tmp_path / "out")
    before = digest(tmp_path / "out")
    with pytest.raises(UserError, match=shown):
        write(images, tmp_path / "out", ShardOptions(**{**vars(OPTIONS), **changed}))
    assert digest(tmp_path / "out") == before


def test_write_shards__other_images_are_refused(images, tmp_path):
    write(images, tmp_path / "out")
    (images / "z.v1" / "n o.0'é.JPG").rename(images / "z.v1" / "new.jpg")
    with pytest.raises(UserError, match="other image names"):
        write(images, tmp_path / "out")


def test_write_shards__moved_images_are_the_same(images, tmp_path):
    write(images, tmp_path / "out")
    before = digest(tmp_path / "out")
    images.rename(tmp_path / "moved")
    write(tmp_path / "moved", tmp_path / "out")
    assert digest(tmp_path / "out") == before


def test_write_shards__folder_of_others(images, tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match="without a manifest"):
        write(images, tmp_path)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"mine"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "classes.txt").write_text("dog\n")
    with pytest.raises(UserError, match="other classes"):
        write(images, tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "train-manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        write(images, tmp_path / "c")


def test_write_shards__two_sets_in_one_folder(images, tmp_path):
    write(images, tmp_path / "out")
    write_shards(open_source(str(images)), tmp_path / "out", "val", OPTIONS)
    assert len(open_source(str(tmp_path / "out" / "*.tar"))) == 60


def test_write_shards__unreadable_images_are_left_out_and_named(images, tmp_path):
    (images / "z.v1" / "empty.jpg").write_bytes(b"")
    (images / "z.v1" / "cut.jpg").write_bytes(encode(picture(90, 90))[:900])
    (images / "z.v1" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(DataError, match=r"of 33 images cannot be read, more than --max-bad-fraction 0\.01"):
        write(images, tmp_path / "a")
    results = write(images, tmp_path / "out", max_bad_fraction=0.1)
    skipped = sorted(tuple(pair) for result in results for pair in result.skipped)
    assert [name for name, _ in skipped] == ["z.v1/cut.jpg", "z.v1/empty.jpg", "z.v1/gone.jpg"]
    assert "empty file" in skipped[1][1]
    assert "No such file" in skipped[2][1]
    after, before = read(tmp_path / "out", 5), open_source(str(images))
    assert len(after) == 30
    assert {before.name(index) for index in range(33)} - {before.name(index) for index in keys(after)} == {
        f"{images}/z.v1/{name}.jpg" for name in ("cut", "empty", "gone")
    }
    with pytest.raises(DataError, match="3 of 33"):  # also when all shards are there
        write(images, tmp_path / "out")


def test_prepare_data__resumes_after_a_full_disk(images, tmp_path):
    """A limit on the size of files stands in for the disk."""
    out = tmp_path / "out"
    options = ("--shorter-side", 40, "--images-per-shard", 8, "--processes", 2)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (15000, 15000))  # noqa: E731
    process = tool(images, out, *options, preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"error: {out} cannot be written: File too large; correct that" in errors
    assert "Traceback" not in errors
    assert not list(out.glob("*.partial"))
    assert not list(out.glob("*.tar"))
    process = tool(images, out, *options)
    assert process.wait(60) == 0
    assert len(read(out, 4)) == 30


def test_prepare_data__refuses_to_write_among_the_images(images):
    with tool(images, images / "shards") as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "lies within IMAGES" in stderr
    assert not (images / "shards").exists()


def test_write_shards__folder_that_cannot_be_made(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write(images, tmp_path / "file" / "out")


def test_check_written__names_a_shard_that_reads_back_otherwise(tmp_path):
    path = tmp_path / "train-000000.tar"
    with tarfile.open(path, "w") as tar:
        shard_writer._add(tar, "0.jpg", b"abc")
    for num_images, checksum in ((1, 5), (2, 0x352441C2)):
        copy = tmp_path / "copy.tar"
        copy.write_bytes(path.read_bytes())
        with pytest.raises(DataError, match="did not read back"):
            shard_writer._check_written(copy, num_images, checksum)
        assert not copy.exists()
    shard_writer._check_written(path, 1, 0x352441C2)  # CRC-32 of "abc"


@pytest.mark.parametrize(
    ("name", "value"), [("shorter_side", 0), ("quality", 101), ("images_per_shard", 0), ("seed", -1)]
)
def test_shard_options__range(images, tmp_path, name, value):
    with pytest.raises(UserError, match=f"{name} is {value}"):
        write(images, tmp_path, ShardOptions(**{name: value}))


def test_write_shards__shards_again(images, tmp_path):
    write(images, tmp_path / "a")
    again = write_shards(read(tmp_path / "a", 4), tmp_path / "b", "train", ShardOptions(20, images_per_shard=50))
    source = read(tmp_path / "b", len(again))
    assert len(source) == 30
    assert {min(source.load(index).size) for index in range(30)} == {20}
    with pytest.raises(DataError, match="not image files"):
        write_shards(open_source("scenes:5@32"), tmp_path / "c", "train", OPTIONS)


# ---- the index of the set


def test_write_shards__index_beside_the_shards_is_mapped(images, tmp_path, monkeypatch):
    write(images, tmp_path / "out")
    first = read(tmp_path / "out", 4)

    def must_not_run(*_):
        raise AssertionError("indexed again")

    monkeypatch.setattr(shard_cache, "index_tar", must_not_run)
    whole = read(tmp_path / "out", 4)
    assert [whole.key(i) for i in range(30)] == [first.key(i) for i in range(30)]
    assert list(whole.labels) == list(first.labels)
    part = open_source(f"{tmp_path}/out/train-{{000003,000001}}.tar")  # another order, not all
    position = {whole.key(i): i for i in range(30)}
    assert len(part) == len({part.key(i) for i in range(len(part))}) < 30
    for i in range(len(part)):
        same = position[part.key(i)]
        assert part.read(i) == whole.read(same)
        assert part.labels[i] == whole.labels[same]
    part.read_ahead([2, 0, 1, 9])


@pytest.mark.parametrize("damage", ["cut", "foreign", "shard changed", "absent"])
def test_write_shards__index_that_does_not_fit_is_not_used(images, tmp_path, caplog, damage):
    out = tmp_path / "out"
    write(images, out)
    expected = [read(out, 4).read(i) for i in range(30)]
    index = out / "train-index.safetensors"
    if damage == "cut":
        index.write_bytes(index.read_bytes()[:-1])
    elif damage == "foreign":
        index.write_bytes(b"{}" * 1000)
    elif damage == "absent":
        index.unlink()
    else:  # of the same size, as another seed gives
        one, two = out / "train-000000.tar", out / "train-000001.tar"
        one.write_bytes(two.read_bytes().ljust(one.stat().st_size, b"\0")[: one.stat().st_size])
        expected[:8] = expected[8:16]
    source = read(out, 4)
    assert ("is not used, the shards are indexed again" in caplog.text) == (damage != "absent")
    if damage != "shard changed":
        assert [source.read(i) for i in range(30)] == expected
        write(images, out)  # finished shards stay, the index is written again
        caplog.clear()
        assert [read(out, 4).read(i) for i in range(30)] == expected
        assert "is not used" not in caplog.text
