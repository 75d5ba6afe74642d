"""HOG targets against a reference of plain loops in float64, written from the formula of MaskFeat."""

import math
import re

import numpy as np
import pytest
import torch

from mae_et.lowfreq import crop_and_normalize
from mae_et.models.hog import NORM_FLOOR, hog_cells, hog_patches
from mae_et.models.mae import MaskedAutoencoder, build_mae
from mae_et.models.sizes import hog_cell, target_width
from tests.parity.test_mae import SMALL

SOBEL = ((1, 0, -1), (2, 0, -2), (1, 0, -1))  # of columns; transposed, of rows
CASES = [
    (96, 3, 16),
    (160, 3, 16),
    (224, 3, 16),
    (96, 1, 16),
    (32, 3, 8),
    (56, 1, 8),
    (98, 3, 14),
    (154, 1, 14),
    (24, 3, 4),
]


def reflected(i, size):
    """Index of a place outside by one: its mirror image, the border not repeated."""
    return 1 if i < 0 else size - 2 if i >= size else i


def naive_cells(image, patch, cell):
    """[C, H, W] float64 -> [C, 9, H / cell, W / cell], a pixel at a time."""
    channels, height, width = image.shape
    bell = [math.exp(-((i - (patch - 1) / 2) ** 2) / (2 * (patch / 2) ** 2)) for i in range(patch)]
    total = sum(a * b for a in bell for b in bell)
    histogram = np.zeros((channels, 9, height // cell, width // cell))
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                gx = gy = 0.0
                for i in range(3):
                    for j in range(3):
                        value = image[c, reflected(y + i - 1, height), reflected(x + j - 1, width)]
                        gx += SOBEL[i][j] * value
                        gy += SOBEL[j][i] * value
                magnitude = math.sqrt(gx * gx + gy * gy)
                direction = math.floor(math.atan2(gx, gy) / math.pi * 9) % 9
                weight = bell[y % patch] * bell[x % patch] / total
                histogram[c, direction, y // cell, x // cell] += weight * magnitude
    norms = np.sqrt((histogram**2).sum(axis=1, keepdims=True))
    return histogram / np.maximum(norms, NORM_FLOOR)


def naive_patches(image, patch, cell):
    """[C, H, W] -> [L, C 9 k k]: each value fetched by its place."""
    cells, k = naive_cells(image, patch, cell), patch // cell
    channels, _, rows, columns = cells.shape
    return np.array(
        [
            [
                cells[c, b, k * row + i, k * column + j]
                for c in range(channels)
                for b in range(9)
                for i in range(k)
                for j in range(k)
            ]
            for row in range(rows // k)
            for column in range(columns // k)
        ]
    )


def random_images(n, channels, height, width=None, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, height, width or height, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize(("size", "channels", "patch"), CASES)
def test_hog_patches__equals_the_loops(size, channels, patch):
    images = random_images(1 if size > 60 else 3, channels, size)
    found = hog_patches(images, patch)
    assert found.dtype == torch.float64
    expected = np.stack([naive_patches(image.numpy(), patch, patch // 2) for image in images])
    assert found.shape == expected.shape == (len(images), (size // patch) ** 2, channels * 9 * 4)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("patch", "cell"), [(16, 16), (16, 4), (12, 4), (7, 7), (7, 1), (2, 2)])
@pytest.mark.parametrize(("height", "width"), [(2, 3), (1, 4)])
def test_hog_patches__other_cells_and_grids_that_are_not_square(patch, cell, height, width):
    image = random_images(1, 3, height * patch, width * patch)
    expected = naive_patches(image[0].numpy(), patch, cell)
    np.testing.assert_allclose(hog_patches(image, patch, cell)[0].numpy(), expected, rtol=0, atol=1e-12)


def test_hog_patches__published_sizes_at_224():
    images = random_images(2, 3, 224).float()
    found = hog_patches(images, 16)
    assert (found.shape, found.dtype) == ((2, 196, 108), torch.float32)
    assert hog_cells(found, 3, (14, 14)).shape == (2, 3, 9, 28, 28)
    # Almost every vote goes where it goes in double precision; a few gradients lie within rounding of a border.
    off = (found - hog_patches(images.double(), 16)).abs()
    assert (off > 1e-4).double().mean() < 1e-4


def test_hog_cells__lays_out_what_hog_patches_cut():
    images = random_images(1, 3, 24, 40)
    expected = naive_cells(images[0].numpy(), 8, 4)
    np.testing.assert_allclose(hog_cells(hog_patches(images, 8), 3, (3, 5))[0].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("degrees", [*range(10, 180, 20), *range(3, 180, 20), *range(17, 180, 20)])
@pytest.mark.parametrize("sign", [1, -1])
def test_hog_patches__a_ramp_votes_for_its_direction(degrees, sign):
    """The brightness rises evenly at an angle; Sobel is exact on it, so that every inner pixel votes for one direction."""
    angle = math.radians(degrees)  # from the vertical, as atan2(horizontal, vertical) counts
    y, x = torch.meshgrid(*[torch.arange(48.0, dtype=torch.float64)] * 2, indexing="ij")
    ramp = sign * (x * math.sin(angle) + y * math.cos(angle))
    cells = hog_cells(hog_patches(ramp[None, None], 16), 1, (3, 3))[0, 0, :, 1:-1, 1:-1]  # the border is mirrored
    expected = torch.zeros(9, 4, 4, dtype=torch.float64)
    expected[degrees // 20] = 1
    torch.testing.assert_close(cells, expected)


@pytest.mark.parametrize(("vertical_edge", "direction"), [(True, 4), (False, 0)])
def test_hog_patches__a_step_edge_is_seen_only_where_it_is(vertical_edge, direction):
    image = torch.zeros(1, 1, 32, 32)
    image[..., 12:] = 1  # within the second column of cells
    if not vertical_edge:
        image = image.mT.contiguous()
    cells = hog_cells(hog_patches(image, 16), 1, (2, 2))[0, 0]
    expected = torch.zeros(9, 4, 4)
    expected[direction, :, 1] = 1
    torch.testing.assert_close(cells, expected if vertical_edge else expected.mT)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.1179, 1e6])
def test_hog_patches__a_constant_image_has_none(value):
    found = hog_patches(torch.full((2, 3, 32, 32), value), 8)
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("bandwidth", [96, 160, 224])
def test_hog_patches__rounding_of_the_crop_makes_no_edges_of_flat_images(bandwidth):
    flat = crop_and_normalize(torch.full((1, 3, 224, 224), 201, dtype=torch.uint8), bandwidth, (0.4,) * 3, (0.2,) * 3)
    assert hog_patches(flat, 16).abs().max() < 0.5
    weak = flat.clone()
    weak[..., 40:] += 1 / 255 / 0.2  # one grey level is an edge
    assert hog_patches(weak, 16).max() > 0.99


def test_hog_patches__norms_are_one_and_contrast_does_not_matter():
    images = random_images(2, 3, 32)
    cells = hog_cells(hog_patches(images, 8), 3, (4, 4))
    torch.testing.assert_close(cells.norm(dim=2), torch.ones(2, 3, 8, 8, dtype=torch.float64))
    assert cells.min() >= 0
    torch.testing.assert_close(hog_patches(4 * images + 3, 8), hog_patches(images, 8))
    torch.testing.assert_close(hog_patches(-images, 8), hog_patches(images, 8))  # directions, not senses


def test_hog_patches__an_image_does_not_depend_on_its_batch():
    images = random_images(5, 3, 32).float()
    together = hog_patches(images, 8)
    for i in range(5):
        assert torch.equal(hog_patches(images[i : i + 1], 8)[0], together[i])
    assert torch.equal(hog_patches(images, 8), together)


def test_hog_patches__low_frequency_image_at_its_own_grid():
    photo = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    small = crop_and_normalize(photo, 32, (0.5,) * 3, (0.25,) * 3)
    found = hog_patches(small, 8)
    np.testing.assert_allclose(found[0].numpy(), naive_patches(small[0].double().numpy(), 8, 4), atol=1e-4)
    assert found.shape[1] == 16


def test_hog_patches__half_precision_and_autocast_change_no_vote():
    images = random_images(2, 3, 32).float()
    expected = hog_patches(images, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hog_patches(images, 8), expected)
    half = images.bfloat16()
    assert torch.equal(hog_patches(half, 8), hog_patches(half.float(), 8))


def test_hog_patches__nothing_is_differentiated():
    images = random_images(1, 3, 16).requires_grad_()
    assert not hog_patches(images, 8).requires_grad
    assert hog_patches(images[:0].detach(), 8).shape == (0, 4, 108)


def test_hog_patches__trains_after_inference_mode():
    model = MaskedAutoencoder(48, 12, target="hog", **SMALL)  # a window that no other test has cached
    with torch.inference_mode():
        model.targets(torch.rand(1, 3, 48, 48))
    model(torch.rand(1, 3, 48, 48))[0].backward()


@pytest.mark.parametrize(
    ("patch", "cell", "message"),
    [
        (16, 6, "do not divide into HOG cells (not a multiple of 6 px): set hog_cell_size to one of 1, 2, 4, 8, 16"),
        (7, None, "(the default of half a patch needs an even size): set hog_cell_size to one of 1, 7"),
        (1, None, "set hog_cell_size to one of 1"),
        (8, 16, "not a multiple of 16 px"),
        (8, 0, "not a multiple of 0 px"),
    ],
)  # fmt: skip
def test_hog_cell__what_does_not_divide(patch, cell, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hog_cell(patch, cell)
    with pytest.raises(ValueError, match=re.escape(message)):
        MaskedAutoencoder(4 * patch, patch, target="hog", hog_cell_size=cell, **SMALL)


def test_hog_patches__images_that_do_not_fit():
    with pytest.raises(ValueError, match="32 x 30 px, not a multiple of patch_size = 8"):
        hog_patches(torch.zeros(1, 3, 32, 30), 8)


# ---- the model ----


@pytest.mark.parametrize(
    ("patch", "channels", "cell"), [(8, 3, None), (8, 1, None), (14, 3, None), (16, 3, 4), (7, 3, 7)]
)
def test_model__head_has_the_targets_width(patch, channels, cell):
    model = MaskedAutoencoder(3 * patch, patch, channels, target="hog", hog_cell_size=cell, **SMALL)
    targets = model.targets(torch.rand(2, channels, 3 * patch, 3 * patch))
    assert model.decoder_pred.out_features == targets.shape[2] == target_width("hog", patch, channels, cell)
    assert model.predict(torch.rand(2, channels, 2 * patch, 4 * patch))[0].shape == (2, 8, targets.shape[2])
    assert target_width("pixels", patch, channels) == patch * patch * channels


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_forward__loss_is_that_of_the_removed_descriptors(autocast, norm_pix_loss):
    torch.manual_seed(0)
    model = MaskedAutoencoder(32, 8, target="hog", norm_pix_loss=norm_pix_loss, **SMALL)
    images = random_images(2, 3, 32).float()
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, mask = model(images, 0.75, noise)
        prediction, _ = model.predict(images, 0.75, noise)
    target = torch.from_numpy(np.stack([naive_patches(image.double().numpy(), 8, 4) for image in images]))
    error = (prediction.double() - target).pow(2).mean(-1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(((error * mask).sum() / mask.sum()).item(), rel=2e-2 if autocast else 1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_model__no_such_target():
    with pytest.raises(ValueError, match="target = 'sift' must be 'pixels' or 'hog'"):
        build_mae("tiny", target="sift")
