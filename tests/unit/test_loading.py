"""The stream of training images, read exactly and fast: the same crops of the same images, at the pixels."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.data import jpeg
from mae_et.data.sources.spec import open_source
from mae_et.data.stream import make_loader
from mae_et.data.transforms import TrainTransform, make_train_transform, sample_rng
from mae_et.errors import ConfigError, UserError
from tests.plans import plan_for

from .test_jpeg import encode, picture

DATA = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "data"


def psnr(found, expected):
    error = (found.double() - expected.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve ordinary JPEG files, and one of each kind that only Pillow reads."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(12):
        options = {"subsampling": i % 3, "progressive": i % 4 == 3}
        (folder / f"a{i:02d}.jpg").write_bytes(encode(picture(140 + 7 * i, 190 - 5 * i, seed=i), **options))
    small = picture(20, 12, seed=99)
    (folder / "b-small.jpg").write_bytes(encode(small))
    small.save(folder / "c.png")
    picture(90, 70).convert("L").save(folder / "d-grey.jpg")
    picture(90, 70).convert("CMYK").save(folder / "e-cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(90, 70).save(folder / "f-turned.jpg", exif=exif)
    return folder


def make_config(folder, loading, **data):
    values = {
        "data": {"train": str(folder), "image_size": 64, "loading": loading, **data},
        "model": {"size": "tiny"},
        "curriculum": {
            "preset": "custom",
            "stages": [{"compute_fraction": 0.4, "bandwidth": 32}, {"compute_fraction": 0.6, "bandwidth": 64}],
            "equivalent_epochs": 6,
            "baseline_equivalent_epochs": 6,
            "warmup_equivalent_epochs": 1,
        },
        "batch": {"global_batch_size": 6},
    }
    return from_dict(PretrainConfig, values)


def stream(folder, loading, num_workers=0, first_step=0, **data):
    """All batches of a run."""
    config = make_config(folder, loading, **data)
    source = open_source(str(folder))
    plan = plan_for(config, len(source))
    transform = make_train_transform(config.data)
    return list(make_loader(source, transform, plan, 3, first_step, 0, num_workers, loading=loading))


def test_loader__fast_differs_from_exact_by_rounding_only(folder):
    exact, fast = stream(folder, "exact"), stream(folder, "fast")
    assert len(exact) == len(fast) > 10
    assert [batch.places.tolist() for batch in exact] == [batch.places.tolist() for batch in fast]
    found, expected = (torch.cat([batch.images for batch in batches]) for batches in (fast, exact))
    worst = min(psnr(a, b) for a, b in zip(found, expected, strict=True))
    assert worst >= 55
    assert (found.int() - expected.int()).abs().max() <= 2
    assert not torch.equal(found, expected)  # it did take the other path


def test_loader__what_only_pillow_reads_is_the_same_to_the_bit(folder, tmp_path):
    for name in ("c.png", "d-grey.jpg", "e-cmyk.jpg", "f-turned.jpg"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for exact, fast in zip(stream(tmp_path, "exact"), stream(tmp_path, "fast"), strict=True):
        assert torch.equal(exact.images, fast.images)


@pytest.mark.parametrize("loading", ["fast", "direct"])
def test_loader__same_stream_from_worker_processes_and_from_the_middle(folder, loading):
    whole = stream(folder, loading)
    for batches, first in ((stream(folder, loading, num_workers=2), 0), (stream(folder, loading, first_step=7), 7)):
        assert len(batches) == len(whole) - first
        for a, b in zip(batches, whole[first:], strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.places, b.places)


def test_loader__direct_gives_each_stage_its_bandwidth(folder):
    exact, direct = stream(folder, "exact"), stream(folder, "direct")
    assert {batch.images.shape[-1] for batch in exact} == {64}
    sides = [batch.images.shape[-2:] for batch in direct]
    assert sides == sorted(sides)
    assert set(sides) == {(32, 32), (64, 64)}
    for a, b in zip(direct, exact, strict=True):
        expected = b.images.float()
        if a.images.shape[-1] == 32:
            expected = interpolate(expected, (32, 32), mode="area")
        assert min(psnr(image, other) for image, other in zip(a.images, expected, strict=True)) > 22  # the same crop


@pytest.mark.parametrize("loading", ["exact", "fast", "direct"])
def test_loader__image_smaller_than_the_bandwidth_is_enlarged(tmp_path, loading):
    content = encode(Image.new("RGB", (9, 5), (200, 40, 90)), quality=100, subsampling=0)
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_bytes(content)
    for batch in stream(tmp_path, loading):
        side = batch.images.shape[-1]
        assert side in (32, 64)
        colour = torch.tensor([200, 40, 90]).view(3, 1, 1).expand(3, side, side)
        assert all((image.int() - colour).abs().max() <= 2 for image in batch.images)


@pytest.mark.parametrize("loading", ["fast", "direct"])
def test_loader__unreadable_images_are_told_as_on_the_exact_path(folder, tmp_path, loading):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "a00.jpg").read_bytes()
    (tmp_path / "a00.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    (tmp_path / "a01.jpg").write_bytes(b"")
    (tmp_path / "a02.jpg").write_bytes(b"<html>")
    (tmp_path / "a03.jpg").unlink()
    (tmp_path / "a03.jpg").symlink_to(tmp_path / "gone.jpg")
    exact = [image for batch in stream(tmp_path, "exact") for image in batch.bad_images]
    fast = [image for batch in stream(tmp_path, loading) for image in batch.bad_images]
    assert len({image.reason for image in exact}) == 4
    assert fast == exact


@pytest.mark.parametrize("ramp", ["none", "crop_scale", "randaugment"])
def test_from_jpeg__draws_the_same_numbers(ramp):
    transform = TrainTransform(48, ramp=ramp)
    close = []
    for seed in range(40):
        content = encode(picture(120, 90, seed))
        with sample_rng(seed, transform.draws_from_torch_alone):
            found = transform.from_jpeg(content, 0.7)
            drawn = torch.rand(1), np.random.rand()
        with sample_rng(seed, transform.draws_from_torch_alone):
            expected = transform(Image.open(io.BytesIO(content)), 0.7)
            assert torch.rand(1) == drawn[0]
            assert ramp != "randaugment" or np.random.rand() == drawn[1]
        assert found.shape == (3, 48, 48)
        assert found.dtype == torch.uint8
        close.append(psnr(found, expected))
    # RandAugment's thresholds and equalisation can turn one level into many.
    assert (np.median(close) if ramp == "randaugment" else min(close)) >= (45 if ramp == "randaugment" else 55)


def test_sample_rng__torch_alone_gives_torchs_numbers_and_leaves_the_others():
    np.random.seed(5)
    expected = np.random.rand()
    with sample_rng(12):
        first = torch.rand(3)
    np.random.seed(5)
    before = torch.get_rng_state()
    with sample_rng(12, torch_alone=True):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.rand() == expected


def test_loader__missing_package_is_told_at_the_start(folder, monkeypatch):
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    assert stream(folder, "exact")
    with pytest.raises(UserError, match="simplejpeg"):
        stream(folder, "fast")


def test_loader__generated_images_are_the_same(tmp_path):
    exact, fast = (stream("scenes:12@70,seed=1", loading) for loading in ("exact", "fast"))
    assert all(torch.equal(a.images, b.images) for a, b in zip(exact, fast, strict=True))


def test_config__grey_images_have_no_fast_path():
    values = {"train": "x", "image_size": 64, "loading": "fast", "mean": [0.5], "std": [0.2]}
    with pytest.raises(ConfigError, match=r'data\.loading = "fast" decodes 8-bit colour JPEG files'):
        from_dict(PretrainConfig, {"data": values, "model": {"size": "tiny", "in_chans": 1}})
    with pytest.raises(ConfigError, match="loading"):
        from_dict(PretrainConfig, {"data": {"train": "x", "loading": "quick"}})


@pytest.mark.parametrize("name", ["coco_mini/val2017", "imagenet_mini"])
@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")
def test_from_jpeg__real_photos(name):
    source = open_source(str(DATA / name))
    transform = TrainTransform(224)
    found, ordinary = [], 0
    for index in range(0, len(source), max(1, len(source) // 40)):
        with sample_rng(index, True):
            pixels = transform.from_jpeg(source.read(index), 0.0)
        if pixels is None:
            continue
        ordinary += 1
        with sample_rng(index, True):
            found.append(psnr(pixels, transform(source.load(index), 0.0)))
    assert ordinary >= 30
    assert min(found) >= 55
