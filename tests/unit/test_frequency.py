"""Low-pass, high-pass and power by band against a naive discrete Fourier transform in float64."""

import cmath
import math

import pytest
import torch

from mae_et.frequency import band_power, high_pass, low_pass
from mae_et.lowfreq import low_frequency_crop

SIZES = [(6, 6), (7, 7), (6, 9), (9, 6), (8, 5)]


def naive_dft(image):
    """Returns {(ky, kx): coefficient} with signed frequencies, by the definition."""
    height, width = image.shape
    return {
        (ky, kx): sum(
            image[y, x].item() * cmath.exp(-2j * math.pi * (ky * y / height + kx * x / width))
            for y in range(height)
            for x in range(width)
        )
        for ky in range(-(height // 2), (height + 1) // 2)
        for kx in range(-(width // 2), (width + 1) // 2)
    }


def naive_inverse(spectrum, height, width):
    rows = [
        [
            sum(
                c * cmath.exp(2j * math.pi * (ky * y / height + kx * x / width)) for (ky, kx), c in spectrum.items()
            ).real
            for x in range(width)
        ]
        for y in range(height)
    ]
    return torch.tensor(rows, dtype=torch.float64) / (height * width)


def naive_radius(ky, kx, height, width, shape="circle"):
    shorter = min(height, width)
    down, right = abs(ky) * shorter / height, abs(kx) * shorter / width
    return math.sqrt(down**2 + right**2) if shape == "circle" else max(down, right)


def random_image(height, width, dtype=torch.float64):
    return torch.rand(height, width, dtype=dtype, generator=torch.Generator().manual_seed(height * 31 + width))


@pytest.mark.parametrize("shape", ["circle", "square"])
@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0, 2.2])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_low_pass__equals_naive_dft(height, width, radius, shape):
    image = random_image(height, width)
    spectrum = naive_dft(image)
    kept = {k: c for k, c in spectrum.items() if naive_radius(*k, height, width, shape) <= radius + 1e-9}
    assert 0 < len(kept) < len(spectrum)
    expected = naive_inverse(kept, height, width)
    torch.testing.assert_close(low_pass(image, radius, shape), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(high_pass(image, radius, shape), image - expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(low_pass(image.float(), radius, shape).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_band_power__equals_naive_dft(height, width):
    image, num_bands = random_image(height, width), 2
    expected = [0.0] * num_bands
    for k, c in naive_dft(image).items():
        band = int((naive_radius(*k, height, width) + 1e-9) / (min(height, width) / 2 / num_bands))
        expected[min(band, num_bands - 1)] += abs(c) ** 2 / (height * width) ** 2
    power = band_power(image, num_bands)
    torch.testing.assert_close(power, torch.tensor(expected, dtype=torch.float64), atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(power.sum(), (image**2).mean())


def test_band_power__bands_add_up_after_a_filter():
    """A low-pass at an edge of the bands leaves power below it only."""
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    whole, low, high = (band_power(x, 8) for x in (images, low_pass(images, 8.0 - 1e-6), high_pass(images, 8.0 - 1e-6)))
    torch.testing.assert_close(low[..., :4], whole[..., :4])
    torch.testing.assert_close(high[..., 4:], whole[..., 4:])
    assert low[..., 4:].max() < 1e-25
    assert high[..., :4].max() < 1e-25


def test_low_pass__keeps_the_mean_and_high_pass_removes_it():
    images = torch.rand(4, 3, 24, 24)
    torch.testing.assert_close(low_pass(images, 3).mean((-1, -2)), images.mean((-1, -2)))
    assert high_pass(images, 3).mean((-1, -2)).abs().max() < 1e-6


@pytest.mark.parametrize("bandwidth", [16, 17])
def test_low_pass__commutes_with_the_crop(bandwidth):
    """A crop keeps the cycles per image, so the radius stays what it is. Tasks filter after the crop because of it."""
    images = torch.randn(3, 33, 33, dtype=torch.float64)
    before = low_frequency_crop(low_pass(images, 5.5), bandwidth, centered=True)
    after = low_pass(low_frequency_crop(images, bandwidth, centered=True), 5.5)
    torch.testing.assert_close(before, after, atol=1e-12, rtol=0)


def test_low_pass__half_precision_and_autocast_compute_in_float32():
    images = torch.rand(2, 16, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        filtered = low_pass(images, 4)
    assert filtered.dtype == torch.bfloat16
    torch.testing.assert_close(filtered, low_pass(images.double(), 4).bfloat16())


def test_low_pass__works_after_a_call_under_inference_mode():
    with torch.inference_mode():
        low_pass(torch.rand(13, 13), 2.5)
    images = torch.rand(13, 13, requires_grad=True)
    low_pass(images, 2.5).sum().backward()
    torch.testing.assert_close(images.grad, torch.ones(13, 13))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: low_pass(torch.zeros(4, 4, dtype=torch.uint8), 1), "uint8"),
        (lambda: low_pass(torch.zeros(4), 1), "expected [..., H, W]"),
        (lambda: low_pass(torch.zeros(4, 4), 0), "radius = 0"),
        (lambda: low_pass(torch.zeros(4, 4), math.nan), "radius = nan"),
        (lambda: low_pass(torch.zeros(4, 4), 1, "round"), "'circle', 'square'"),
        (lambda: band_power(torch.zeros(4, 4), 3), "num_bands = 3 must be from 1 to 2"),
    ],
)
def test_arguments__faults_are_named(call, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[").replace("...", r"\.\.\.")):
        call()
