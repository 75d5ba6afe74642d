"""The low-frequency crop against a plain FFT in float64, and the properties that make it one.

Tolerances: 1e-12 in float64, 1e-5 of the largest value in float32, half a unit in the last place for 16-bit types.
"""

import math
import shutil
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_et.lowfreq import crop_and_normalize, low_frequency_crop, normalize

SIZES = [  # H, W, B: even and odd, wide and tall, one frequency, all of them
    (224, 224, 96),
    (224, 224, 97),
    (224, 224, 160),
    (224, 224, 223),
    (224, 224, 1),
    (224, 224, 2),
    (224, 160, 96),
    (97, 131, 64),
    (97, 131, 63),
    (131, 96, 96),
    (96, 131, 96),
    (97, 131, 97),
    (64, 64, 64),
    (63, 63, 63),
    (7, 5, 3),
    (6, 4, 4),
    (2, 2, 1),
    (1, 1, 1),
    (1, 9, 1),
]


def random_images(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def crop_by_fft(images, bandwidth):
    """The definition: DFT, keep the centred block, scale, inverse DFT, real part."""
    height, width = images.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(images.double()), dim=(-2, -1))
    rows, columns = bandwidth if isinstance(bandwidth, tuple) else (bandwidth, bandwidth)
    top, left = height // 2 - rows // 2, width // 2 - columns // 2
    block = spectrum[..., top : top + rows, left : left + columns]
    block = torch.fft.ifftshift(block, dim=(-2, -1)) * (rows * columns / (height * width))
    return torch.fft.ifft2(block).real


def crop_centered_by_dft(images, bandwidth):
    """The centred grid: explicit DFT about the pixel centres; at even B the lines at -B/2 and +B/2 count half each."""
    result = images.to(torch.complex128)
    for axis in (-2, -1):
        side = bandwidth[axis] if isinstance(bandwidth, tuple) else bandwidth
        ks = torch.arange(-(side // 2), side // 2 + 1, dtype=torch.float64)
        weights = torch.ones_like(ks)
        if side % 2 == 0:
            weights[[0, -1]] = 0.5
        size = images.shape[axis]
        source = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        target = (torch.arange(side, dtype=torch.float64) + 0.5) / side
        forward = torch.exp(-2j * math.pi * ks[:, None] * source)
        backward = torch.exp(2j * math.pi * target[:, None] * ks) * weights / size
        result = torch.movedim(torch.tensordot(backward @ forward, result, dims=([1], [axis])), 0, axis)
    assert result.imag.abs().max() < 1e-9
    return result.real


def reference(images, bandwidth, centered):
    return crop_centered_by_dft(images, bandwidth) if centered else crop_by_fft(images, bandwidth)


def worst(found, expected):
    """The largest difference over the largest value."""
    assert found.shape == expected.shape
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


# ---- the definition ----


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("height", "width", "bandwidth"), SIZES)
def test_low_frequency_crop__equals_the_plain_fft(height, width, bandwidth, centered):
    images = random_images(2, 3, height, width)
    expected = reference(images, bandwidth, centered)
    assert (low_frequency_crop(images, bandwidth, centered) - expected).abs().max() <= 1e-12
    assert (
        worst(low_frequency_crop(images.float(), bandwidth, centered), reference(images.float(), bandwidth, centered))
        <= 1e-5
    )


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 48), st.integers(1, 48), st.booleans(), st.integers(0, 2**31))
def test_low_frequency_crop__equals_the_plain_fft_at_any_size(data, height, width, centered, seed):
    sides = st.tuples(st.integers(1, height), st.integers(1, width))
    bandwidth = data.draw(st.one_of(st.integers(1, min(height, width)), sides))
    images = random_images(2, height, width, seed=seed)
    expected = reference(images, bandwidth, centered)
    assert (low_frequency_crop(images, bandwidth, centered) - expected).abs().max() <= 1e-12
    single = images.float()
    assert worst(low_frequency_crop(single, bandwidth, centered), reference(single, bandwidth, centered)) <= 1e-5


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 5, 32, 33])
def test_low_frequency_crop__full_bandwidth_is_the_identity(size, dtype, centered):
    images = random_images(2, 3, size, size, dtype=dtype)
    found = low_frequency_crop(images, size, centered)
    assert torch.equal(found, images)
    assert found.data_ptr() != images.data_ptr()  # the caller may write into the result


@pytest.mark.parametrize("centered", [False, True])
def test_low_frequency_crop__full_bandwidth_of_one_axis_leaves_it(centered):
    images = random_images(2, 33, 1).expand(2, 33, 48).clone()  # constant along the longer side
    assert (low_frequency_crop(images, 33, centered) - images[..., :33]).abs().max() <= 1e-12


# ---- invariants ----


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("height", "width", "bandwidth"), SIZES)
def test_low_frequency_crop__mean_is_kept(height, width, bandwidth, centered):
    images = random_images(2, 3, height, width) + 0.7
    found = low_frequency_crop(images, bandwidth, centered)
    assert (found.mean((-2, -1)) - images.mean((-2, -1))).abs().max() <= 1e-12
    found = low_frequency_crop(images.float(), bandwidth, centered).double()
    assert (found.mean((-2, -1)) - images.mean((-2, -1))).abs().max() <= 1e-6


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("height", "width", "bandwidth"), SIZES)
def test_low_frequency_crop__constants_stay(height, width, bandwidth, centered):
    images = torch.full((1, height, width), 3.25, dtype=torch.float64)
    assert (low_frequency_crop(images, bandwidth, centered) - 3.25).abs().max() <= 1e-12
    assert (low_frequency_crop(images.float(), bandwidth, centered) - 3.25).abs().max() <= 1e-5


def waves(size_y, size_x, bandwidth, centered):
    """A sum of waves below the band's limit, sampled on a grid; the same function of relative coordinates for any size."""
    shift = 0.5 if centered else 0.0
    y = ((torch.arange(size_y, dtype=torch.float64) + shift) / size_y)[:, None]
    x = ((torch.arange(size_x, dtype=torch.float64) + shift) / size_x)[None, :]
    rng, highest = torch.Generator().manual_seed(3), (bandwidth - 1) // 2
    result = torch.full((size_y, size_x), 0.4, dtype=torch.float64)
    for _ in range(12):
        ky, kx = torch.randint(-highest, highest + 1, (2,), generator=rng).tolist()
        phase = torch.rand(1, generator=rng, dtype=torch.float64).item() * 2 * math.pi
        result = result + torch.cos(2 * math.pi * (ky * y + kx * x) + phase)
    return result


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("height", "width", "bandwidth"), [(224, 224, 96), (97, 131, 63), (64, 48, 32), (64, 48, 31)])
def test_low_frequency_crop__band_limited_image_survives(height, width, bandwidth, centered):
    """Every sample is the function's value there: the grid of the pixel centres, or that of the pixel corners."""
    found = low_frequency_crop(waves(height, width, bandwidth, centered), bandwidth, centered)
    assert (found - waves(bandwidth, bandwidth, bandwidth, centered)).abs().max() <= 1e-11


@pytest.mark.parametrize("centered", [False, True])
def test_low_frequency_crop__frequencies_outside_the_band_vanish(centered):
    n = torch.arange(64, dtype=torch.float64) / 64
    images = torch.cos(2 * math.pi * 20 * n)[:, None] + torch.cos(2 * math.pi * 17 * n)[None, :]
    assert low_frequency_crop(images, 32, centered).abs().max() <= 1e-12


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("bandwidth", [20, 21])
def test_low_frequency_crop__is_linear(bandwidth, centered):
    a, b = random_images(3, 40, 50, seed=1), random_images(3, 40, 50, seed=2)
    found = low_frequency_crop(2.5 * a - 0.75 * b, bandwidth, centered)
    parts = 2.5 * low_frequency_crop(a, bandwidth, centered) - 0.75 * low_frequency_crop(b, bandwidth, centered)
    assert (found - parts).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(("height", "width", "bandwidth"), SIZES)
def test_low_frequency_crop__centered_commutes_with_flips(height, width, bandwidth, axis, dtype):
    images = random_images(2, height, width, dtype=dtype)
    found = low_frequency_crop(images.flip(axis), bandwidth, centered=True)
    expected = low_frequency_crop(images, bandwidth, centered=True).flip(axis)
    assert (found - expected).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5)


def test_low_frequency_crop__published_does_not_commute_with_flips():
    images = random_images(2, 224, 224)
    found = low_frequency_crop(images.flip(-1), 96)
    assert (found - low_frequency_crop(images, 96).flip(-1)).abs().max() > 0.1


def blob(height, width, center_y, center_x, sigma):
    """A Gaussian at relative coordinates (0 to 1 over the image), pixel centres at (n + 1/2) / size."""
    y = ((torch.arange(height, dtype=torch.float64) + 0.5) / height)[:, None]
    x = ((torch.arange(width, dtype=torch.float64) + 0.5) / width)[None, :]
    return torch.exp(-((y - center_y) ** 2 + (x - center_x) ** 2) / (2 * sigma**2))


def centroid(image):
    """In relative coordinates, (y, x)."""
    total = image.sum()
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in image.shape)
    return ((image.sum(1) * y).sum() / total).item(), ((image.sum(0) * x).sum() / total).item()


@pytest.mark.parametrize(
    ("height", "width", "bandwidth"), [(224, 224, 96), (224, 224, 97), (224, 160, 128), (97, 131, 64)]
)
def test_low_frequency_crop__centered_does_not_shift(height, width, bandwidth):
    image = blob(height, width, 0.44, 0.53, 0.06)
    assert centroid(image) == pytest.approx((0.44, 0.53), abs=1e-9)
    assert centroid(low_frequency_crop(image, bandwidth, centered=True)) == pytest.approx((0.44, 0.53), abs=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "bandwidth"), [(224, 224, 96), (224, 224, 97), (224, 160, 128), (97, 131, 64)]
)
def test_low_frequency_crop__published_shifts_by_half_the_grids_difference(height, width, bandwidth):
    y, x = centroid(low_frequency_crop(blob(height, width, 0.44, 0.53, 0.06), bandwidth))
    assert (y - 0.44) * height == pytest.approx((height / bandwidth - 1) / 2, abs=1e-4)  # source px
    assert (x - 0.53) * width == pytest.approx((width / bandwidth - 1) / 2, abs=1e-4)


# ---- types, shapes, gradients ----


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("dtype", "half_ulp"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_low_frequency_crop__16_bit_in_and_out_computes_in_float32(dtype, half_ulp, centered):
    images = (1000 + 50 * random_images(2, 3, 224, 224)).to(dtype)  # a float16 sum over a row would overflow
    found = low_frequency_crop(images, 96, centered)
    assert found.dtype == dtype
    expected = reference(images, 96, centered)
    assert ((found.double() - expected).abs() / expected.abs()).max() <= 1.01 * half_ulp
    assert torch.equal(found, low_frequency_crop(images.float(), 96, centered).to(dtype))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_frequency_crop__autocast_changes_nothing(dtype, centered):
    images = random_images(2, 3, 64, 64, dtype=dtype)
    expected = low_frequency_crop(images, 32, centered)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = low_frequency_crop(images, 32, centered)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("bandwidth", [4, 5, 7])
def test_low_frequency_crop__gradcheck(bandwidth, centered):
    images = random_images(2, 7, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: low_frequency_crop(x, bandwidth, centered), images)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("bandwidth", [20, 21])
def test_low_frequency_crop__float32_gradient_is_the_adjoint(bandwidth, centered):
    weights = random_images(2, bandwidth, bandwidth, seed=5)
    images = random_images(2, 40, 50).requires_grad_()
    (expected,) = torch.autograd.grad((reference(images, bandwidth, centered) * weights).sum(), images)
    single = images.detach().float().requires_grad_()
    (found,) = torch.autograd.grad((low_frequency_crop(single, bandwidth, centered) * weights.float()).sum(), single)
    assert worst(found, expected) <= 1e-5


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3), (2, 2, 1, 2)])
def test_low_frequency_crop__any_leading_dimensions(leading, dtype, centered):
    images = random_images(*leading, 24, 20, dtype=dtype)
    found = low_frequency_crop(images, 10, centered)
    assert found.shape == (*leading, 10, 10)
    one_by_one = torch.stack([low_frequency_crop(x, 10, centered) for x in images.reshape(-1, 24, 20)])
    assert torch.allclose(found.reshape(-1, 10, 10), one_by_one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_frequency_crop__empty_batch(dtype):
    assert low_frequency_crop(torch.zeros(0, 3, 24, 20, dtype=dtype), 10).shape == (0, 3, 10, 10)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(0, 3, 1, 2),  # channels last
        lambda x: x.permute(0, 3, 2, 1),
        lambda x: x[:, ::2, :, :].permute(0, 3, 1, 2),
        lambda x: x.expand(3, -1, -1, -1).permute(0, 3, 1, 2),
    ],
)
def test_low_frequency_crop__non_contiguous_input(view, centered):
    images = view(random_images(1, 40, 30, 3, dtype=torch.float32))
    assert not images.is_contiguous()
    before = images.clone()
    assert worst(low_frequency_crop(images, 12, centered), reference(images, 12, centered)) <= 1e-5
    assert torch.equal(images, before)


def test_low_frequency_crop__input_is_left_alone():
    images = random_images(2, 3, 32, 32, dtype=torch.float32)
    before = images.clone()
    low_frequency_crop(images, 16)
    low_frequency_crop(images, 32).zero_()
    assert torch.equal(images, before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, nullcontext])
def test_low_frequency_crop__trains_after_a_first_call_in_inference_mode(mode):
    size = {torch.inference_mode: 41, torch.no_grad: 43, nullcontext: 45}[mode]  # sizes that no other test has cached
    with mode():
        low_frequency_crop(torch.rand(1, size, size), 20)
    images = torch.rand(1, size, size, requires_grad=True)
    low_frequency_crop(images, 20).sum().backward()
    assert images.grad is not None
    assert images.grad.sum().item() == pytest.approx(20 * 20, rel=1e-5)  # the mean is kept: each output has weight 1


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("bandwidth", [32, 33, 64])
def test_low_frequency_crop__traces_into_one_graph(bandwidth, centered):
    torch._dynamo.reset()
    compiled = torch.compile(low_frequency_crop, fullgraph=True, backend="eager")
    for batch in (2, 3):  # the second size makes the batch dimension dynamic
        images = random_images(batch, 3, 64, 64, dtype=torch.float32)
        assert worst(compiled(images, bandwidth, centered), reference(images, bandwidth, centered)) <= 1e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
@pytest.mark.parametrize("centered", [False, True])
def test_low_frequency_crop__compiles(centered):
    torch._dynamo.reset()
    compiled = torch.compile(low_frequency_crop, fullgraph=True)
    images = random_images(2, 3, 64, 64, dtype=torch.float32)
    assert worst(compiled(images, 32, centered), reference(images, 32, centered)) <= 1e-5


# ---- faults ----


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_low_frequency_crop__no_floating_point_images(dtype):
    with pytest.raises(ValueError, match=r"float"):
        low_frequency_crop(torch.zeros(3, 8, 8, dtype=dtype), 4)


@pytest.mark.parametrize("bandwidth", [0, -1, 9, 10**9, 4.0, "4", None, True])
def test_low_frequency_crop__bandwidth_out_of_range(bandwidth):
    with pytest.raises(ValueError, match="from 1 to 8"):
        low_frequency_crop(torch.zeros(3, 8, 12), bandwidth)
    with pytest.raises(ValueError, match="from 1 to 8"):
        crop_and_normalize(torch.zeros(3, 12, 8, dtype=torch.uint8), bandwidth, [0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize("shape", [(), (8,)])
def test_low_frequency_crop__too_few_dimensions(shape):
    with pytest.raises(ValueError, match=r"expected \[\.\.\., H, W\]"):
        low_frequency_crop(torch.zeros(shape), 4)


# ---- fused normalisation ----

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.1)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("num_channels", [1, 3, 4])
@pytest.mark.parametrize(("height", "width", "bandwidth"), [(64, 64, 32), (64, 48, 31), (32, 32, 32), (224, 224, 96)])
def test_crop_and_normalize__equals_normalising_first(height, width, bandwidth, num_channels, centered):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, num_channels, height, width), generator=rng, dtype=torch.uint8)
    before = images.clone()
    mean, std = MEAN[:num_channels], STD[:num_channels]
    found = crop_and_normalize(images, bandwidth, mean, std, centered)
    columns = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
    normalized = (images.double() / 255 - next(columns)) / next(columns)
    assert found.dtype == torch.float32
    assert worst(found, reference(normalized, bandwidth, centered)) <= 1e-5
    assert torch.equal(images, before)


def test_crop_and_normalize__channels_last_input():
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 40, 30, 3), generator=rng, dtype=torch.uint8).permute(0, 3, 1, 2)
    found = crop_and_normalize(images, 16, MEAN[:3], STD[:3])
    assert torch.allclose(found, crop_and_normalize(images.contiguous(), 16, MEAN[:3], STD[:3]), atol=1e-5)


@pytest.mark.parametrize("leading", [(3,), (2, 3), (2, 2, 3)])
def test_crop_and_normalize__any_leading_dimensions(leading):
    images = torch.full((*leading, 20, 24), 51, dtype=torch.uint8)  # 51 / 255 = .2
    found = crop_and_normalize(images, 8, (0.2, 0.1, 0.0), (1.0, 0.5, 0.1))
    assert found.shape == (*leading, 8, 8)
    expected = torch.tensor([0.0, 0.2, 2.0])[:, None, None].expand(found.shape)
    assert torch.allclose(found, expected, atol=1e-5)


def test_crop_and_normalize__faults():
    images = torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="takes uint8"):
        crop_and_normalize(images.float(), 4, MEAN[:3], STD[:3])
    with pytest.raises(ValueError, match="3 channels"):
        crop_and_normalize(images, 4, MEAN[:1], STD[:3])
    with pytest.raises(ValueError, match="3 channels"):
        crop_and_normalize(images, 4, MEAN[:3], STD[:4])
    with pytest.raises(ValueError, match=r"\[\.\.\., C, H, W\]"):
        crop_and_normalize(images[0], 4, MEAN[:3], STD[:3])


# ---- normalize ----


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", ["chw", "hwc"])
def test_normalize__equals_crop_and_normalize_to_the_bit(channels, layout):
    images = torch.randint(0, 256, (19, channels, 24, 24), dtype=torch.uint8)
    if layout == "hwc":
        images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]
    expected = crop_and_normalize(images, 24, mean, std)
    new = normalize(images, mean, std)
    assert torch.equal(new, expected)
    assert new.stride() == expected.stride()
    out = torch.full_like(expected, float("nan"))
    assert normalize(images, mean, std, out) is out
    assert torch.equal(out, expected)


def test_normalize__faults():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="uint8"):
        normalize(images.float(), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match=r"\[n, C, H, W\]"):
        normalize(images[0], (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="3 channels, mean 1 values"):
        normalize(images, (0.5,), (0.5,))
