"""Classification by a linear probe on cached features.

Shapes: M bank features, Q queries, D channels, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ITERATIONS = 100


@torch.enable_grad()
def linear_predict(bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int, l2: float = 1e-3) -> Tensor:
    """Classifies queries by multinomial logistic regression on standardized features, without random numbers.

    The probe is for comparing backbones within one study. The published linear probe (`mae-et classify`, protocol
    "linear_probe") trains on augmented images for 90 epochs.

    Args:
        bank: [M, D] features with known labels.
        labels: [M] int64, 0 to K - 1.
        queries: [Q, D].
        num_classes: K.
        l2: weight of the squared norm of the weights in the loss.
    Returns:
        [Q] int64 predicted classes.
    """
    bank, queries, labels = bank.double(), queries.double(), labels.clone()  # inference tensors keep no gradient
    mean, std = bank.mean(0), bank.std(0).clamp_min(1e-6)
    bank, queries = (bank - mean) / std, (queries - mean) / std
    weight = torch.zeros(num_classes, bank.shape[1], dtype=torch.float64, device=bank.device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=bank.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(bank, weight, bias), labels) + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return F.linear(queries, weight, bias).argmax(dim=1)
