"""Measures of features that need no labels.

Shapes: M images, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-7
FIRST_RANK, LAST_RANK = 4, 100  # eigenvalues that `alpha_req` fits
MIN_EIGENVALUES = 3


def rank_me(features: Tensor) -> float:
    """Returns the effective rank of features: the exponential of the entropy of their normalized singular values.

    Args:
        features: [M, D]; they are not centered, as published.
    Returns:
        From 1, if all features are multiples of one vector, to min(M, D). NaN if a feature is not finite.
    Raises:
        ValueError: if there is no feature, or all are 0.
    Source: RankMe (arXiv 2210.02885), equation 1, with its epsilon of 1e-7.
    """
    if not torch.isfinite(features).all():
        return float("nan")
    values = torch.linalg.svdvals(features.double())
    total = values.sum()
    if not total > 0:
        raise ValueError(f"features of shape {tuple(features.shape)} are empty or all 0, so they have no rank")
    shares = values / total + EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))


def alpha_req(features: Tensor) -> float:
    """Returns the exponent alpha of the power law rank^-alpha that the eigenvalues of the features' covariance follow.

    The fit is a line through log eigenvalue over log rank, each point weighted by 1 / rank. The paper gives no ranks; 4 to 100
    and the weights are those of its released code. With fewer eigenvalues the fit ends at the last one above rounding.

    Args:
        features: [M, D]; they are centered here.
    Returns:
        Larger where few directions hold most of the variance; the paper finds the best features near 1. NaN if a feature is
        not finite, or fewer than three eigenvalues are left to fit.
    Source: alpha-ReQ (arXiv 2202.05808, NeurIPS 2022).
    """
    if not torch.isfinite(features).all() or not len(features):
        return float("nan")
    centered = features.double() - features.double().mean(dim=0)
    values = torch.linalg.svdvals(centered).square()
    rounding = torch.finfo(torch.float32).eps ** 2 * values[0] * max(features.shape)
    values = values[values > rounding][FIRST_RANK - 1 : LAST_RANK]
    if len(values) < MIN_EIGENVALUES:
        return float("nan")
    ranks = torch.arange(FIRST_RANK, FIRST_RANK + len(values), dtype=torch.float64, device=values.device)
    weights = 1 / ranks
    x, y = (each - (weights * each).sum() / weights.sum() for each in (ranks.log(), values.log()))
    return -float((weights * x * y).sum() / (weights * x.square()).sum())
