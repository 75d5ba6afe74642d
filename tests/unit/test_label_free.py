"""alpha-ReQ against its formula and against features whose spectrum is known."""

import math

import numpy as np
import pytest
import torch

from mae_et.evaluation.label_free import alpha_req


def with_spectrum(eigenvalues, num=400, seed=0):
    """Returns centered features whose covariance has these eigenvalues, exactly."""
    torch.manual_seed(seed)
    noise = torch.randn(num, len(eigenvalues), dtype=torch.float64)
    basis = torch.linalg.qr(noise - noise.mean(dim=0))[0]
    mixing = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))[0]
    return basis * torch.as_tensor(eigenvalues, dtype=torch.float64).sqrt() @ mixing


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req__finds_the_exponent_of_a_power_law_wherever_the_mean_is(alpha):
    features = with_spectrum(np.arange(1, 161, dtype=float) ** -alpha)
    assert alpha_req(features + 3) == pytest.approx(alpha, rel=1e-6)


def test_alpha_req__fits_ranks_4_to_100_with_weights_of_1_over_rank():
    eigenvalues = np.arange(1, 161, dtype=float) ** -1.2
    eigenvalues[3:100] *= np.random.default_rng(0).uniform(0.9, 1.1, 97)
    eigenvalues = np.sort(eigenvalues)[::-1].copy()
    eigenvalues[:3], eigenvalues[100:] = 50.0, 1e-5  # outside of the fit
    ranks = np.arange(4, 101)
    slope = np.polyfit(np.log(ranks), np.log(eigenvalues[3:100]), 1, w=np.sqrt(1 / ranks))[0]
    assert alpha_req(with_spectrum(eigenvalues)) == pytest.approx(-slope, rel=1e-6)


def test_alpha_req__uses_what_is_above_rounding_and_is_nan_without_a_spectrum():
    few = with_spectrum(np.arange(1, 13, dtype=float) ** -1.0)
    padded = torch.cat([few, torch.zeros(400, 20)], dim=1).float()
    assert alpha_req(padded) == pytest.approx(1.0, rel=1e-3)
    assert math.isnan(alpha_req(torch.ones(10, 4)))
    assert math.isnan(alpha_req(few[:, :5]))
    assert math.isnan(alpha_req(torch.tensor([[1.0, float("nan")]] * 9)))
