"""Raw shards: the pixels that were written, the rows that are read, resuming, damage, and the loader on top of them."""

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import interpolate
from torchvision.transforms import RandomResizedCrop

from mae_et.commands import prepare
from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.data.decoding import BadImageError, Decoding, decode_image
from mae_et.data.inspection import inspect_images
from mae_et.data.sources import raw_writer
from mae_et.data.sources.raw import RawOptions, RawSource
from mae_et.data.sources.raw_writer import RawJob, write_raw
from mae_et.data.sources.spec import open_source
from mae_et.data.transforms import TrainTransform, draw_box, sample_rng
from mae_et.errors import DataError, UserError
from mae_et.tasks.pretrain import MAETask
from mae_et.tasks.run import run_training
from tests.conftest import small_values

from .test_jpeg import encode, picture
from .test_loading import make_config, plan_for, psnr
from .test_loading import stream as read_stream

OPTIONS = RawOptions(sizes=(64, 32), images_per_shard=8)
NUM_IMAGES = 20


@pytest.fixture
def serial(monkeypatch):
    """Writes in this process: starting another takes seconds."""

    def write_here(write, job, numbers, num_processes, progress):
        for number in numbers:
            yield number, write(job, number, lambda: progress(1))

    monkeypatch.setattr(raw_writer, "write_in_processes", write_here)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Photos in two classes: larger than both levels, than one, than none; one is grey, one a PNG."""
    root = tmp_path_factory.mktemp("images")
    for i in range(NUM_IMAGES):
        path = root / ("köter", "cat")[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(picture(*((90 + i, 120 - i), (50, 70 + i), (20, 24))[i % 3], seed=i)))
    picture(80, 70, seed=50).convert("L").save(root / "cat" / "grey.jpg")
    picture(70, 99, seed=51).save(root / "cat" / "z.png")
    return root


def write(images, out, options=OPTIONS, part=(1, 1), **arguments):
    source = open_source(str(images), options.num_channels)
    return write_raw(RawJob(source, out, "train", options, part), **arguments)


@pytest.fixture
def out(images, tmp_path, serial):
    write(images, tmp_path / "out")
    return tmp_path / "out"


def opened(out, **arguments):
    return open_source(str(out / "train.raw.json"), **arguments)


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def fitted(image, size):
    """The level of an image, from its definition."""
    scale = min(1, size / min(image.size))
    size = tuple(round(side * scale) for side in image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def test_raw__pixels_labels_and_names_of_the_images(images, out):
    before, after = open_source(str(images)), opened(out, need_labels=True)
    assert len(after) == len(before) == NUM_IMAGES + 2
    assert list(after.class_names) == list(before.class_names) == ["cat", "köter"]
    places = {before.key(i): i for i in range(len(before))}
    order = [places[after.key(i).partition(":")[2]] for i in range(len(after))]
    assert sorted(order) == list(range(len(before))) != order
    assert list(after.labels) == [before.labels[i] for i in order]
    for i, place in enumerate(order):
        image = before.load(place)
        expected = np.asarray(fitted(image, 64))
        assert np.array_equal(np.asarray(after.load(i)), expected)
        assert after.shape(i) == expected.shape[:2]
        small = np.asarray(fitted(image, 32))
        box = (0, 0, *after.shape(i))
        assert np.array_equal(after.read_region(i, box, min(small.shape[:2])), small)


def test_raw__region_equals_the_crop_of_the_whole_image(out):
    source, rng = opened(out), np.random.default_rng(0)
    for again in range(2):  # the first reading compares the checksum, the second reads the rows alone
        for i in range(len(source)):
            height, width = source.shape(i)
            h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            expected = np.asarray(source.load(i))[top : top + h, left : left + w]
            assert np.array_equal(source.read_region(i, (top, left, h, w)), expected), again


def test_raw__smallest_level_with_enough_pixels(out):
    source = opened(out)
    index = next(i for i in range(len(source)) if min(source.shape(i)) == 64)
    height, width = source.shape(index)
    assert source.read_region(index, (0, 0, 64, 64), 32).shape[:2] == (32, 32)
    assert source.read_region(index, (0, 0, 64, 64), 33).shape[:2] == (64, 64)
    assert source.read_region(index, (0, 0, 40, 50), 20).shape[:2] == (20, 25)
    assert source.read_region(index, (0, 0, 40, 50), 21).shape[:2] == (40, 50)
    # Edges are rounded to the nearest px, and at least one px is kept, also at the last row and column.
    assert source.read_region(index, (height - 1, width - 1, 1, 1), 0).shape == (1, 1, 3)


@pytest.mark.parametrize(("stored", "read"), [(3, 1), (1, 3), (1, 1)])
def test_raw__grey_and_colour(images, tmp_path, serial, stored, read):
    write(images, tmp_path, RawOptions((4000,), stored))
    before, after = open_source(str(images), stored), opened(tmp_path, num_channels=read)
    places = {before.key(i): i for i in range(len(before))}
    mode = {1: "L", 3: "RGB"}[read]
    for i in range(len(after)):
        expected = before.load(places[after.key(i).partition(":")[2]]).convert(mode)
        assert after.load(i).mode == mode
        assert np.array_equal(np.asarray(after.load(i)), np.asarray(expected))
        region = after.read_region(i, (1, 2, 5, 7))
        assert np.array_equal(region.squeeze(), np.asarray(expected)[1:6, 2:9])
        assert region.shape == (5, 7, read)


def test_raw__config_takes_grey_pixels():
    assert make_config("x.raw.json", "fast").data.loading == "fast"
    from mae_et.config.schema import PretrainConfig, from_dict

    values = {
        "data": {"train": "x.raw.json", "loading": "direct", "mean": (0.5,), "std": (0.5,)},
        "model": {"in_chans": 1},
    }
    assert from_dict(PretrainConfig, values).model.in_chans == 1


# ---- the loader ----


def test_draw_box__equals_torchvision():
    rng = np.random.default_rng(0)
    shapes = [(256, 341), (500, 10), (10, 500), (1, 1), (1, 3000), *rng.integers(1, 900, (40, 2)).tolist()]
    for seed in range(2000):
        height, width = shapes[seed % len(shapes)]
        smallest = (0.08, 0.2, 0.67, 1.0)[seed % 4]
        torch.default_generator.manual_seed(seed)
        expected = RandomResizedCrop.get_params(torch.empty(1).expand(1, height, width), [smallest, 1], [3 / 4, 4 / 3])
        following = torch.rand(1)
        torch.default_generator.manual_seed(seed)
        assert draw_box(height, width, smallest) == expected
        assert torch.equal(torch.rand(1), following)


def reference(source, config, plan, side_of):
    """The stream from its definition: the order, the drawn crop of the whole image, torch's resize, the flip."""
    images, place = [], 0
    for step in range(plan.num_steps):
        for _ in range(6):
            order = np.random.default_rng((3, place // len(source))).permutation(len(source))
            whole = torch.from_numpy(np.array(source.load(int(order[place % len(source)])))).permute(2, 0, 1)
            with sample_rng(3 * 0x9E3779B1 + place, torch_alone=True):
                top, left, h, w = RandomResizedCrop.get_params(whole, [0.2, 1.0], [3 / 4, 4 / 3])
                flip = torch.rand(1).item() < 0.5
            crop = whole[None, :, top : top + h, left : left + w]
            side = side_of(plan.stage_at(step).bandwidth)
            pixels = interpolate(crop, (side, side), mode="bicubic", antialias=True)[0]
            images.append(pixels.flip(-1) if flip else pixels)
            place += 1
    return images


@pytest.mark.parametrize("loading", ["fast", "direct"])
def test_loader__raw_equals_the_reference_in_memory(images, tmp_path, serial, loading):
    write(images, tmp_path, RawOptions((64,)))
    path = str(tmp_path / "train.raw.json")
    config = make_config(path, loading)
    source = open_source(path)
    plan = plan_for(config, len(source))
    expected = reference(source, config, plan, lambda bandwidth: 64 if loading == "fast" else bandwidth)
    here, there = read_stream(path, loading), read_stream(path, loading, num_workers=2)
    for batches in (here, there):
        found = [image for batch in batches for image in batch.images]
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    later = read_stream(path, loading, first_step=5)
    assert all(torch.equal(a.images, b.images) for a, b in zip(later, here[5:], strict=True))


def test_loader__raw_draws_the_same_as_the_other_ways(images, tmp_path, serial):
    write(images, tmp_path, RawOptions((4000,)))
    source, transform = opened(tmp_path), TrainTransform(48)
    for ramp in ("none", "randaugment"):
        transform = TrainTransform(48, ramp=ramp)
        for i in range(len(source)):
            content = (images / source.key(i).partition(":")[2]).read_bytes()
            with sample_rng(i):
                exact = transform(decode_image(content), 0.5)
            with sample_rng(i):
                fast = transform.from_jpeg(content, 0.5)
            with sample_rng(i):
                crop = transform.draw_crop(*source.shape(i), 0.5)
                found = transform.from_region(lambda box, side, i=i: source.read_region(i, box, side), crop, 0.5)
            if fast is not None:
                assert torch.equal(found, fast)
            if ramp == "none":
                assert psnr(found, exact) >= 55


def test_loader__raw_with_randaugment_does_not_depend_on_workers(out):
    path, options = str(out / "train.raw.json"), {"augmentation": {"ramp": "randaugment"}}
    here, there = (read_stream(path, "direct", num_workers=n, **options) for n in (0, 1))
    assert all(torch.equal(a.images, b.images) for a, b in zip(here, there, strict=True))


def test_loader__changed_block_is_named_and_replaced(out):
    source = opened(out)
    path = out / "train-000001-64.raw"
    content = bytearray(path.read_bytes())
    content[1] ^= 1  # in the first image of the second shard, which is image 8
    path.write_bytes(content)
    end = int(np.prod(source.shape(8))) * 3
    with pytest.raises(BadImageError, match=rf"block 0\.\.{end} of train-000001-64.raw has the checksum .* prepare"):
        source.load(8)
    bad = [image for batch in read_stream(str(out / "train.raw.json"), "fast") for image in batch.bad_images]
    assert {image.index for image in bad} == {8}
    assert any("1 of 22 images cannot be read" in finding.text for finding in inspect_images(source).items)


def test_loader__checks_each_block_once_in_all_processes(out):
    source = opened(out)
    source.load(3)
    assert source._checked[:, 3].tolist() == [1, 0]
    assert source._checked.is_shared()


def test_source__removed_while_it_is_read(out):
    source = opened(out)
    source.load(0)
    os.truncate(out / "train-000000-64.raw", 10)
    with pytest.raises(BadImageError, match="changed after it was opened"):
        source.load(0)
    shutil.rmtree(out)
    with pytest.raises(BadImageError, match="cannot be read"):
        source.load(9)


# ---- what is wrong with a set ----


def spoil_header(out, old, new):
    path = out / "train.raw.json"
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: os.truncate(out / "train-000001-64.raw", 100), r"-000001-64\.raw has 100 bytes, and its index \d+: "),
        (lambda out: (out / "train-000002-32.raw").unlink(), r"the pixels at 32 px of a shard, cannot be read: No such file"),
        (lambda out: (out / "train-000001.raw.npz").unlink(), r"written in part: 1 of 3 shards have no index \('?train-000001"),
        (lambda out: os.truncate(out / "train-000001.raw.npz", 900), r"train-000001\.raw\.npz is damaged"),
        (lambda out: spoil_header(out, '"seed": 0', '"seed": 1'), r"written with other options or images"),
        (lambda out: spoil_header(out, '"format": 1', '"format": 7'), r"format 7, and this version reads format 1"),
        (lambda out: spoil_header(out, '"options"', '"option"'), r"is not the header of a raw set"),
        (lambda out: spoil_header(out, "{", ""), r"is not the header of a raw set"),
        (lambda out: (out / "train.raw.json").unlink(), "does not exist"),
    ],
)  # fmt: skip
def test_source__damaged_set_is_refused(out, damage, message):
    damage(out)
    with pytest.raises(DataError, match=message):
        opened(out)


def test_source__value_range_of_the_set(out):
    with pytest.raises(DataError, match=r"value range None, but data\.value_range is \(0, 4095\)"):
        RawSource(out / "train.raw.json", Decoding(value_range=(0, 4095)))


def test_check_sizes__level_that_a_stage_needs(images, out, tmp_path):
    source = opened(out)
    source.check_sizes([32, 64])
    with pytest.raises(
        UserError, match=r"holds pixels at 64 and 32 px, but crops are resized to 65, 224 px.*--sizes 256 64 32"
    ):
        source.check_sizes([224, 65, 32])
    write(images, tmp_path / "whole", RawOptions((120,)))
    opened(tmp_path / "whole").check_sizes([4000])  # nothing was reduced, so nothing is lost


def test_make_stream__refuses_a_missing_level(out):
    from mae_et.data.replay import make_stream
    from mae_et.data.transforms import make_train_transform

    config = make_config(out / "train.raw.json", "fast", image_size=96)
    source = opened(out)
    with pytest.raises(UserError, match="resized to 96 px"):
        make_stream(source, make_train_transform(config.data), plan_for(config, len(source)), config)


# ---- writing ----


def test_write_raw__several_processes_and_machines_write_the_same(images, out, tmp_path):
    again = tmp_path / "parts"
    assert [len(write(images, again, part=(i, 2))) for i in (1, 2)] == [2, 1]
    assert contents(again) == contents(out)


def test_write_raw__processes(images, tmp_path):
    results = write(images, tmp_path / "a", num_processes=2)
    assert sum(result.num_images for result in results) == len(opened(tmp_path / "a")) == NUM_IMAGES + 2


def test_write_raw__one_part_is_not_a_set(images, tmp_path, serial):
    write(images, tmp_path, part=(2, 2))
    with pytest.raises(DataError, match=r"2 of 3 shards have no index.*--part"):
        opened(tmp_path)


def test_write_raw__resumes_and_writes_changed_shards_again(images, out):
    before, times = contents(out), {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "train-000000.raw.npz").unlink()
    (out / "train-000000-64.raw.abcd.partial").write_bytes(b"left over")
    changed = bytearray(before["train-000001-32.raw"])
    changed[-1] ^= 255
    (out / "train-000001-32.raw").write_bytes(changed)
    time.sleep(0.01)
    handled = []
    results = write(images, out, progress=handled.append)
    assert contents(out) == before
    assert sum(handled) == NUM_IMAGES + 2
    assert results[0].fault == results[2].fault == ""
    assert "train-000001-32.raw differs from its checksum" in results[1].fault
    assert (out / "train-000002-64.raw").stat().st_mtime_ns == times["train-000002-64.raw"]


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (RawOptions((64,), images_per_shard=8), r"sizes was \[64, 32\], is \[64\]"),
        (RawOptions((64, 32), 1, 8), "num_channels was 3, is 1"),
        (RawOptions((64, 32), 3, 9), "images_per_shard was 8, is 9"),
    ],
)
def test_write_raw__other_options_are_refused(images, out, options, change):
    with pytest.raises(UserError, match=f"other options or images \\({change}"):
        write(images, out, options)


def test_write_raw__other_images_are_refused(images, out, tmp_path):
    shutil.copytree(images, tmp_path / "more")
    shutil.copy(images / "cat" / "z.png", tmp_path / "more" / "cat" / "zz.png")
    with pytest.raises(UserError, match="num_images was 22, is 23, other image names"):
        write(tmp_path / "more", out)


def test_write_raw__unreadable_images_are_left_out_and_named(images, tmp_path, serial):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    with pytest.raises(DataError, match=r"1 of 23 images cannot be read, more than --max-bad-fraction 0\.01"):
        write(tmp_path / "images", tmp_path / "out")
    results = write(tmp_path / "images", tmp_path / "out", max_bad_fraction=0.5)
    assert [name for result in results for name, _ in result.skipped] == ["cat/broken.jpg"]
    source = opened(tmp_path / "out")
    assert len(source) == NUM_IMAGES + 2
    assert "could not be read when the set was prepared" in source.left_out.describe(only_losses=True)


def test_check_space__expected_size_against_the_disk(tmp_path, monkeypatch):
    job = RawJob(open_source("scenes:30@48x64"), tmp_path / "new" / "out", "train", RawOptions((48, 24)))
    expected = job.expected_bytes()
    assert expected == 30 * 3 * (48 * 64 + 24 * 32)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=expected - 1))
    with pytest.raises(UserError, match=r"needs 0\.000346 GB more for the pixels, and its disk has 0\.000346 GB free"):
        job.check_space(expected)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=expected))
    job.check_space(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoding", "raw", "--quality", "9"], "--quality has no effect with --encoding raw"),
        (["--sizes", "64", "--part", "1/2"], "--sizes, --part has no effect with --encoding jpeg"),
        (["--encoding", "raw", "--part", "3/2"], "part is 3/2; write I/N with 1 <= I <= N"),
        (["--encoding", "raw", "--part", "half"], "--part is 'half'; write I/N"),
        (["--encoding", "raw", "--sizes", "64", "64"], r"sizes are \(64, 64\); give different sides"),
        (["--encoding", "raw", "--sizes", "0"], "sizes are"),
    ],
)
def test_prepare__options_without_effect_or_out_of_range(images, tmp_path, arguments, message):
    args = prepare.make_parser().parse_args([str(images), str(tmp_path / "out"), *arguments])
    with pytest.raises(UserError, match=message):
        prepare.main(args)


def test_prepare__raw_prints_the_size_and_how_to_use_it(images, tmp_path, serial, capsys):
    arguments = [str(images), str(tmp_path / "out"), "--encoding", "raw", "--sizes", "32", "64"]
    prepare.main(prepare.make_parser().parse_args(arguments))
    printed = capsys.readouterr().out
    assert "expected size: 0.0" in printed
    assert "22 images in 1 shards at 64, 32 px" in printed
    assert f"data.train={tmp_path}/out/train.raw.json" in printed
    assert opened(Path(tmp_path / "out")).sizes == (64, 32)


# ---- more than 8 bits, and other numbers of channels ----


def deep_images(folder, num=6, bands=5, dtype=np.uint16, high=4000, size=(40, 52)):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(num):
        small = rng.integers(0, high + 1, (5, 7, bands)).astype(np.float32)
        bands_of = [Image.fromarray(np.ascontiguousarray(small[..., c])) for c in range(bands)]
        values = np.dstack([np.asarray(band.resize(size[::-1], Image.Resampling.BILINEAR)) for band in bands_of])
        np.save(folder / f"{i}.npy", values.astype(dtype))
    return folder


def written(folder, out, channels=5, bits=16, value_range=(0, 4000), sizes=(64,)):
    arguments = [folder, out, "--encoding", "raw", "--channels", channels, "--bits", bits, "--sizes", *sizes]
    arguments += ["--processes", 1, *(["--value-range", *value_range] if value_range else [])]
    prepare.main(prepare.make_parser().parse_args(list(map(str, arguments))))
    return open_source(str(out / "train.raw.json"), channels, value_range=value_range if bits == 16 else None)


def test_raw__deep_images_of_any_channels_keep_16_bits(tmp_path, serial, capsys):
    folder = deep_images(tmp_path / "images")
    source = written(folder, tmp_path / "out")
    plain = open_source(str(folder), 5, value_range=(0, 4000))
    assert "model.in_chans=5 'data.value_range=(0,4000)'" in capsys.readouterr().out
    assert source.decoding.dtype == "float32"
    places = {plain.key(i): i for i in range(len(plain))}
    for i in range(len(source)):
        expected = plain.load(places[source.key(i).partition(":")[2]]).read()
        found = source.load(i)
        assert (found.height, found.width) == (40, 52)
        assert found.read().dtype == np.float32
        np.testing.assert_allclose(found.read(), expected, atol=0.5 / 65535 + 1e-7)
        region = source.read_region(i, (3, 5, 20, 30))
        assert region.dtype == np.float32
        np.testing.assert_array_equal(region, found.read((3, 5, 20, 30)))
    assert (tmp_path / "out/train-000000-64.raw").stat().st_size == 6 * 40 * 52 * 5 * 2


def test_raw__deep_images_are_reduced_by_lanczos_and_clipped(tmp_path, serial, capsys):
    folder = deep_images(tmp_path / "images", bands=1, high=5000)
    source = written(folder, tmp_path / "out", channels=1, sizes=(20,))
    assert "images have values beyond the value range, which were clipped" in capsys.readouterr().out
    plain = open_source(str(folder), 1, value_range=(0, 4000))
    places = {plain.key(i): i for i in range(len(plain))}
    for i in range(len(source)):
        whole = plain.load(places[source.key(i).partition(":")[2]]).read()[..., 0]
        expected = np.asarray(Image.fromarray(whole).resize((26, 20), Image.Resampling.LANCZOS)).clip(0, 1)
        np.testing.assert_allclose(source.load(i).read()[..., 0], expected, atol=0.5 / 65535 + 1e-7)


def test_raw__eight_bits_of_five_channels(tmp_path, serial):
    folder = deep_images(tmp_path / "images", dtype=np.uint8, high=255)
    source = written(folder, tmp_path / "out", bits=8, value_range=None)
    plain = open_source(str(folder), 5)
    places = {plain.key(i): i for i in range(len(plain))}
    assert source.decoding == plain.decoding
    for i in range(len(source)):
        expected = plain.load(places[source.key(i).partition(":")[2]]).read()
        np.testing.assert_array_equal(source.load(i).read(), expected)
        np.testing.assert_array_equal(source.read_region(i, (0, 0, 40, 52)), expected)


@pytest.mark.parametrize(
    ("channels", "value_range", "message"),
    [
        (5, None, r"holds 16-bit pixels; set data.value_range=\[0.0, 4000.0\]"),
        (
            5,
            (0, 65535),
            r"value range \[0.0, 4000.0\], but data.value_range is \(0, 65535\); .* or set \[0.0, 4000.0\]",
        ),
        (3, (0, 4000), "holds images of 5 channels, but model.in_chans is 3; set model.in_chans = 5"),
    ],
)
def test_source__deep_set_that_does_not_fit_the_config(tmp_path, serial, channels, value_range, message):
    written(deep_images(tmp_path / "images", num=2), tmp_path / "out")
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / "out/train.raw.json"), channels, value_range=value_range)


def test_prepare__16_bits_need_a_range(tmp_path):
    arguments = [str(tmp_path), str(tmp_path.parent / "out"), "--encoding", "raw", "--bits", "16"]
    with pytest.raises(UserError, match="--bits 16 needs --value-range BLACK WHITE"):
        prepare.main(prepare.make_parser().parse_args(arguments))


def test_header__of_8_bits_is_that_of_older_versions(out):
    values = json.loads((out / "train.raw.json").read_text())
    assert "dtype" not in values["options"]
    with np.load(out / "train-000000.raw.npz") as arrays:
        older = {key: arrays[key] for key in arrays if key != "shares_outside"}
    np.savez(out / "train-000000.raw.npz", **older)
    assert len(opened(out)) == 22


def deep_values(train, channels, **overrides):
    return small_values(
        data__train=str(train), data__value_range=[0, 4000], data__mean=[0.5] * channels, data__std=[0.25] * channels,
        model__in_chans=channels, run__loggers=[], curriculum__equivalent_epochs=2.0, **overrides,
    )  # fmt: skip


@pytest.mark.parametrize("loading", ["exact", "fast", "direct"])
def test_pretrain__deep_raw_shards(tmp_path, serial, loading):
    written(deep_images(tmp_path / "images", num=12), tmp_path / "out")
    values = deep_values(tmp_path / "out/train.raw.json", 5, data__loading=loading)
    run_training(MAETask, from_dict(PretrainConfig, values), tmp_path / "run", device="cpu")
    assert load_file(tmp_path / "run/backbone.safetensors")["patch_embed.proj.weight"].shape[1] == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__augmentation__ramp": "randaugment"}, r"randaugment.* changes 8-bit pictures"),
        ({"replay__mode": "mix"}, "replay buffer keeps 8-bit images"),
    ],
)
def test_pretrain__what_deep_raw_shards_cannot_have(tmp_path, serial, overrides, message):
    written(deep_images(tmp_path / "images", num=12, bands=1), tmp_path / "out", channels=1)
    values = deep_values(tmp_path / "out/train.raw.json", 1, data__loading="fast", **overrides)
    with pytest.raises(UserError, match=message):
        run_training(MAETask, from_dict(PretrainConfig, values), tmp_path / "run", device="cpu")


def test_raw__an_image_of_one_row(tmp_path, serial):
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("L", (9, 1), 40 + i).save(tmp_path / f"images/{i}.png")
    source = written(tmp_path / "images", tmp_path / "out", channels=1, bits=8, value_range=None)
    assert source.load(0).size == (9, 1)
