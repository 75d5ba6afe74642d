"""Reconstruction error by band: the meaning of 1 and 0, and that a mask leaves no trace in it."""

import pytest
import torch

from mae_et.config.filters import num_bands_at
from mae_et.evaluation.bands import band_errors, predict_all_patches
from mae_et.frequency import band_power, low_pass
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.targets import normalize_patches, patchify

SIZE, PATCH, STD = 32, 4, (0.2, 0.25, 0.3)


class Oracle(MaskedAutoencoder):
    """Predicts chosen images on removed patches, and nonsense on visible ones."""

    def __init__(self, answer, **kwargs):
        super().__init__(SIZE, PATCH, 3, 16, 1, 2, 16, 1, 2, **kwargs)
        self.answer, self.num_passes = answer, 0

    def predict(self, images, mask_ratio=0.75, noise=None):
        self.num_passes += 1
        _, mask = super().predict(images, mask_ratio, noise)
        patches = patchify(self.answer, PATCH)
        patches = normalize_patches(patches) if self.norm_pix_loss else patches
        return torch.where(mask[..., None].bool(), patches, 1e3), mask


@pytest.fixture
def images():
    white = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    distance = torch.hypot(torch.fft.fftfreq(SIZE)[:, None] * SIZE, torch.fft.rfftfreq(SIZE)[None] * SIZE)
    return torch.fft.irfft2(torch.fft.rfft2(white) / (1 + distance), s=(SIZE, SIZE))  # falls like photos


def ratio(model, images, mask_ratio=0.75):
    noise = torch.rand(len(images), (SIZE // PATCH) ** 2, generator=torch.Generator().manual_seed(1))
    error, power = band_errors(model.eval(), images, mask_ratio, noise, STD, num_bands_at(SIZE)).sum(dim=0)
    return error / power


@pytest.mark.parametrize("mask_ratio", [0.25, 0.4, 0.5, 0.75, 0.9])
def test_predict_all_patches__each_comes_from_a_pass_that_removed_it(images, mask_ratio):
    model = Oracle(images).eval()
    noise = torch.rand(3, 64)
    torch.testing.assert_close(predict_all_patches(model, images, mask_ratio, noise), patchify(images, PATCH))
    num_removed = 64 - int(64 * (1 - mask_ratio))
    assert model.num_passes == -(-64 // num_removed)


def test_band_errors__perfect_predictions_have_none(images):
    assert ratio(Oracle(images), images).max() < 1e-9
    assert ratio(Oracle(images, norm_pix_loss=True), images).max() < 1e-9


def test_band_errors__the_mean_colour_has_an_error_of_one_in_each_band(images):
    torch.testing.assert_close(ratio(Oracle(torch.zeros_like(images)), images), torch.ones(8))


def test_band_errors__a_model_of_the_low_frequencies_knows_these_alone(images):
    """The edges of a mask would spread the low frequencies into all bands."""
    measured = ratio(Oracle(low_pass(images, 8 - 1e-3)), images)
    assert measured[:4].max() < 1e-9
    torch.testing.assert_close(measured[4:], torch.ones(4))


def test_band_errors__power_is_that_of_the_pixels(images):
    noise = torch.rand(3, 64)
    powers = band_errors(Oracle(images).eval(), images, 0.75, noise, STD, 8)
    expected = band_power(images * torch.tensor(STD).view(3, 1, 1), 8).sum(dim=1)
    torch.testing.assert_close(powers[:, 1], expected)


def test_band_errors__hog_is_refused(images):
    model = MaskedAutoencoder(SIZE, 8, 3, 16, 1, 2, 16, 1, 2, target="hog").eval()
    with pytest.raises(ValueError, match="predicts hog"):
        band_errors(model, images, 0.75, torch.rand(3, 16), STD, 8)


def test_num_bands_at__small_images_have_fewer():
    assert [num_bands_at(size) for size in (224, 16, 8)] == [8, 8, 4]
