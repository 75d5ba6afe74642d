"""Measures of features that need no labels.

Shapes: M images, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-7


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
