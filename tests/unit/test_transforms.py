"""Crop, flip, ramps and seeding, checked against their definitions, torchvision and timm."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize
from torchvision.transforms import functional as F

from mae_et.data.transforms import RAMPS, EvalTransform, TrainTransform, posterize, sample_rng


def noise(width=60, height=40, mode="RGB"):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def photo(width=64, height=64, mode="RGB"):
    """Smooth and in colour, so that every operation shows."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    image = np.stack([40 + 160 * x, 60 + 120 * y, 90 + 100 * x * y], 2).astype(np.uint8)
    return Image.fromarray(image).convert(mode)


def coordinates(width, height):
    """The pixel at column x and row y holds x in red and y in green."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))


# ---- training ----


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(60, 40), (1, 1), (3, 500), (500, 3)])
def test_train_transform__uint8_of_the_asked_size(ramp, mode, size):
    transform = TrainTransform(32, ramp=ramp)
    for seed, strength in enumerate([0.0, 0.5, 1.0] * 8):
        with sample_rng(seed):
            found = transform(noise(*size, mode), strength)
        assert found.dtype == torch.uint8
        assert found.shape == (3 if mode == "RGB" else 1, 32, 32)


def test_train_transform__equals_torchvision_crop_and_flip():
    transform, crop = (
        TrainTransform(24),
        RandomResizedCrop(24, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
    )
    for seed in range(20):
        with sample_rng(seed):
            found = transform(noise(), 0.3)
        with sample_rng(seed):
            expected = crop(noise())
            expected = F.hflip(expected) if torch.rand(1).item() < 0.5 else expected
        assert torch.equal(found, F.pil_to_tensor(expected))


def test_train_transform__flips_half_of_the_images():
    transform = TrainTransform(16, min_scale=1.0)
    image = coordinates(16, 16)  # a square at scale 1 is cropped whole, or by the aspect alone
    flipped = []
    for seed in range(400):
        with sample_rng(seed):
            row = transform(image, 0.0)[0, 8].int()
        flipped.append(bool(row[0] > row[-1]))
    assert 150 < sum(flipped) < 250  # 5 standard deviations
    transform = TrainTransform(16, flip=False)
    for seed in range(20):
        with sample_rng(seed):
            row = transform(image, 0.0)[0, 8].int()
        assert row[0] < row[-1]


def crop_areas(transform, strength, monkeypatch, num=400):
    """The share of the image that each crop covers, seen where the crop is made."""
    areas = []
    original = F.resized_crop

    def spy(image, top, left, height, width, *rest):
        areas.append(height * width / (image.width * image.height))
        return original(image, top, left, height, width, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("mae_et.data.transforms.F.resized_crop", spy)
        for seed in range(num):
            with sample_rng(seed):
                transform(noise(200, 200), strength)
    return np.array(areas)


@pytest.mark.parametrize(("strength", "smallest"), [(0.0, 0.67), (0.5, 0.435), (1.0, 0.2)])
def test_train_transform__crop_scale_anneals_the_smallest_crop(strength, smallest, monkeypatch):
    areas = crop_areas(TrainTransform(16, ramp="crop_scale"), strength, monkeypatch)
    tolerance = 0.01  # sides are rounded to pixels of 1/200
    assert smallest - tolerance <= areas.min() < smallest + 0.05
    assert areas.max() > 0.9


def test_train_transform__ramp_none_ignores_the_strength(monkeypatch):
    transform = TrainTransform(16)
    for strength in (0.0, 1.0):
        areas = crop_areas(transform, strength, monkeypatch)
        assert 0.19 <= areas.min() < 0.25
    with sample_rng(1):
        weak = transform(noise(), 0.0)
    with sample_rng(1):
        assert torch.equal(weak, transform(noise(), 1.0))


def test_train_transform__crop_scale_at_full_strength_is_ramp_none():
    for seed in range(10):
        with sample_rng(seed):
            ramped = TrainTransform(16, ramp="crop_scale")(noise(), 1.0)
        with sample_rng(seed):
            assert torch.equal(ramped, TrainTransform(16)(noise(), 0.0))


def test_train_transform__randaugment_is_timms_of_the_rounded_magnitude():
    hparams = {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    transform = TrainTransform(32, ramp="randaugment", color_jitter=0.0)
    for strength, magnitude in ((0.0, 0), (0.05, 0), (0.06, 1), (0.5, 4), (1.0, 9)):
        oracle = rand_augment_transform(f"rand-m{magnitude}-mstd0.5-inc1", dict(hparams))
        for seed in range(15):
            with sample_rng(seed):
                found = transform(photo(), strength)
            with sample_rng(seed):
                expected = oracle(F.to_pil_image(TrainTransform(32)(photo(), 0.0)))
            assert torch.equal(found, F.pil_to_tensor(expected))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_posterize__keeps_the_highest_bits(mode):
    image = noise(mode=mode)
    for bits in range(9):
        expected = np.asarray(image) >> (8 - bits) << (8 - bits) if bits else np.zeros_like(np.asarray(image))
        assert np.array_equal(np.asarray(posterize(image, bits)), expected), bits


def test_train_transform__randaugment_at_its_strongest_never_fails():
    """There timm asks Pillow to keep 0 bits, which some versions refuse."""
    transform = TrainTransform(8, ramp="randaugment", max_magnitude=10)
    for seed in range(200):
        with sample_rng(seed):
            assert transform(photo(12, 12), 1.0).shape == (3, 8, 8)


def test_train_transform__randaugment_at_strength_0_is_not_the_identity():
    transform, plain = TrainTransform(32, ramp="randaugment"), TrainTransform(32)
    changes = []
    for seed in range(60):
        with sample_rng(seed):
            found = transform(photo(), 0.0)
        with sample_rng(seed):
            changes.append((found.int() - plain(photo(), 0.0).int()).abs().max().item())
    assert any(change > 50 for change in changes)  # e.g. Invert
    assert any(change == 0 for change in changes)


def test_train_transform__randaugment_grows_with_the_strength():
    transform, plain = TrainTransform(32, ramp="randaugment"), TrainTransform(32)
    means = []
    for strength in (0.0, 1.0):
        total = 0.0
        for seed in range(200):
            with sample_rng(seed):
                found = transform(photo(), strength)
            with sample_rng(seed):
                total += (found.float() - plain(photo(), 0.0).float()).abs().mean().item()
        means.append(total / 200)
    assert means[1] > 1.3 * means[0]


def test_train_transform__color_jitter_scales_with_the_strength():
    still = TrainTransform(32, ramp="randaugment", max_magnitude=0, color_jitter=0.0)
    jitter = TrainTransform(32, ramp="randaugment", max_magnitude=0, color_jitter=0.4)
    change = {}
    for strength in (0.0, 0.25, 1.0):
        total = 0.0
        for seed in range(60):
            with sample_rng(seed):
                expected = still(photo(), strength)
            with sample_rng(seed):
                total += (jitter(photo(), strength).float() - expected.float()).abs().mean().item()
        change[strength] = total / 60
    assert change[0.0] == 0
    assert change[0.25] < 0.5 * change[1.0]
    assert change[1.0] > 5


def test_train_transform__randaugment_of_grey_ignores_colour_only():
    """Every operation runs on mode L, and gives what it gives on the same image as RGB."""
    names = [op.name for op in TrainTransform(8, ramp="randaugment")._rand_augment(9, "L").ops]
    transform = TrainTransform(32, ramp="randaugment")
    for index, name in enumerate(names):
        grey, colour = (transform._rand_augment(9, mode).ops[index] for mode in ("L", "RGB"))
        grey.prob = colour.prob = 1.0
        with sample_rng(index):
            found = np.asarray(grey(photo(mode="L"))).astype(int)
        with sample_rng(index):
            expected = np.asarray(colour(photo(mode="L").convert("RGB"))).astype(int)
        covered = (expected[..., 0] == expected[..., 1]) & (expected[..., 1] == expected[..., 2])  # the fill has a hue
        assert covered.mean() > 0.4, name
        assert np.abs(found - expected[..., 0])[covered].max() <= 8, name


def test_train_transform__caches_rand_augment():
    transform = TrainTransform(32, ramp="randaugment")
    for strength in (0.0, 0.01, 1.0, 1.0):
        transform(photo(), strength)
    assert set(transform._rand_augments) == {(0, "RGB"), (9, "RGB")}
    assert transform._rand_augment(9, "RGB") is transform._rand_augment(9, "RGB")


def test_train_transform__pickles():
    transform = TrainTransform(16, ramp="randaugment")
    transform(photo(), 0.5)
    copy = pickle.loads(pickle.dumps(transform))
    with sample_rng(3):
        expected = transform(photo(), 0.5)
    with sample_rng(3):
        assert torch.equal(copy(photo(), 0.5), expected)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"min_scale": 0.0}, "min_scale is 0"),
        ({"min_scale": 1.1}, "min_scale is 1.1"),
        ({"start_min_scale": -1}, "start_min_scale is -1"),
        ({"ramp": "linear"}, "none, crop_scale, randaugment"),
        ({"interpolation": "cubic"}, "bicubic, bilinear"),
        ({"max_magnitude": 11}, "max_magnitude is 11"),
        ({"color_jitter": 2}, "color_jitter is 2"),
    ],
)
def test_train_transform__argument_out_of_range(arguments, text):
    with pytest.raises(ValueError, match=text):
        TrainTransform(**{"image_size": 8, **arguments})


@pytest.mark.parametrize("strength", [-0.01, 1.01, float("nan")])
def test_train_transform__strength_out_of_range(strength):
    with pytest.raises(ValueError, match="strength"):
        TrainTransform(8)(noise(), strength)


# ---- evaluation ----


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(60, 40), (40, 60), (500, 333), (5, 3), (300, 20)])
def test_eval_transform__equals_torchvision(size, mode):
    image = noise(*size, mode)
    expected = CenterCrop(112)(Resize(128, InterpolationMode.BICUBIC)(image))
    assert torch.equal(EvalTransform(112)(image), F.pil_to_tensor(expected))


def test_eval_transform__keeps_the_centre():
    found = EvalTransform(8, crop_ratio=0.5)(coordinates(16, 16))
    assert found[0, 0].tolist() == list(range(4, 12))
    assert found[1, :, 0].tolist() == list(range(4, 12))


def test_eval_transform__crop_ratio_1_of_a_fitting_image_is_the_identity():
    image = noise(32, 32)
    assert torch.equal(EvalTransform(32, crop_ratio=1.0)(image), F.pil_to_tensor(image))


@pytest.mark.parametrize("size", [(1, 1), (1, 100000), (100001, 1)])
def test_eval_transform__extreme_shapes_do_not_explode(size):
    found = EvalTransform(224)(Image.new("RGB", size, (9, 8, 7)))
    assert found.shape == (3, 224, 224)
    assert found[:, 5, 5].tolist() == [9, 8, 7]


@pytest.mark.parametrize("size", [(40, 2000), (2001, 40), (40, 641)])
def test_eval_transform__cutting_the_far_ends_first_changes_nothing(size):
    image = photo(*size)
    expected = F.pil_to_tensor(CenterCrop(56)(Resize(64, InterpolationMode.BICUBIC)(image)))
    assert (EvalTransform(56)(image).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("arguments", [(0, 0.875), (8, 0.0), (8, 1.5)])
def test_eval_transform__argument_out_of_range(arguments):
    with pytest.raises(ValueError, match=r"image_size is|crop_ratio is"):
        EvalTransform(*arguments)


# ---- seeding ----


def draw():
    return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), random.gauss(0, 1), np.random.randn()


@pytest.mark.parametrize("ramp", RAMPS)
def test_sample_rng__same_seed_same_image(ramp):
    transform = TrainTransform(32, ramp=ramp)
    results = []
    for _ in range(2):
        draw()  # after any earlier draw
        images = []
        for seed in range(8):
            with sample_rng(seed):
                images.append(transform(noise(), 0.7))
        results.append(torch.stack(images))
    assert torch.equal(*results)
    assert len({image.numpy().tobytes() for image in results[0]}) == 8


def test_sample_rng__restores_all_generators():
    draw()  # leaves half-used pairs of normal numbers behind
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    with sample_rng(7):
        draw()
        random.gauss(0, 1)
        np.random.randn()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    np.testing.assert_equal(np.random.get_state(), states[2])


def test_sample_rng__restores_after_an_error_and_nests():
    expected_state = random.getstate()
    with pytest.raises(KeyError), sample_rng(1):
        raise KeyError
    assert random.getstate() == expected_state
    with sample_rng(1):
        draw()
        expected = draw()
    with sample_rng(1):
        draw()
        with sample_rng(2):
            draw()
        assert draw() == expected


def test_sample_rng__every_bit_of_the_seed_reaches_every_generator():
    def first(seed):
        with sample_rng(seed):
            return torch.rand(1).item(), random.random(), np.random.rand()

    seeds = [0, *(1 << bit for bit in range(64))]
    for values in zip(*(first(seed) for seed in seeds), strict=True):
        assert len(set(values)) == len(seeds)
    assert first(1 << 64) == first(0)
    assert first(-1) == first((1 << 64) - 1)


def test_sample_rng__neighbouring_seeds_are_unrelated():
    draws = []
    for seed in range(2000):
        with sample_rng(seed):
            draws.append([torch.rand(1).item(), random.random(), np.random.rand()])
    values = np.array(draws)
    columns = np.concatenate([values[1:], values[:-1]], axis=1)  # each generator, and the same one seed before
    correlations = np.corrcoef(columns.T) - np.eye(6)
    assert np.abs(correlations).max() < 0.1  # 4.5 standard deviations
    assert np.abs(values.mean(0) - 0.5).max() < 0.03
