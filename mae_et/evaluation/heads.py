"""Linear heads on cached features, trained side by side with several learning rates and weight decays.

Shapes: M features, D channels, K classes, G heads, n rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH_SIZE = 256
MOMENTUM = 0.9
MIN_STD = 1e-6  # of a channel


@dataclass(frozen=True)
class Heads:
    """Trained heads and the standardization of their features."""

    weight: Tensor  # [G, K, D]
    bias: Tensor  # [G, K]
    mean: Tensor  # [D]
    std: Tensor  # [D]

    def logits(self, features: Tensor, head: int) -> Tensor:
        """Applies one head: [n, D] -> [n, K] float32."""
        return F.linear((features.float() - self.mean) / self.std, self.weight[head], self.bias[head])


@torch.no_grad()
def train_heads(
    features: Tensor, targets: Tensor, num_classes: int, pairs: Sequence[tuple[float, float]], epochs: int, seed: int
) -> Heads:
    """Trains a linear head for each pair by SGD on the cross-entropy, all on the same batches.

    The features are standardized by channel, which is a BatchNorm without parameters over all of them. All heads start at 0,
    and the learning rates follow a cosine to 0.

    Args:
        features: [M, D].
        targets: [M] int64 classes, or [M, K] probabilities of the classes.
        num_classes: K.
        pairs: (learning rate, weight decay) of each head; the weight decay is that of the weights, not of the bias.
        epochs: passes over the features.
        seed: of the order.
    Source: heads side by side as in the linear evaluation of DINOv2 (arXiv 2304.07193).
    """
    features = features.float()
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(MIN_STD)
    num, num_heads = len(features), len(pairs)
    rates, decays = torch.tensor(pairs, device=features.device).unbind(1)
    weight = torch.zeros(num_heads, num_classes, features.shape[1], device=features.device)
    bias = torch.zeros(num_heads, num_classes, device=features.device)
    weight_step, bias_step = torch.zeros_like(weight), torch.zeros_like(bias)
    generator = torch.Generator().manual_seed(seed)
    num_batches = -(-num // BATCH_SIZE)
    for epoch in range(epochs):
        order = torch.randperm(num, generator=generator).to(features.device)
        for i, rows in enumerate(order.tensor_split(num_batches)):
            inputs = (features[rows] - mean) / std
            logits = F.linear(inputs, weight.flatten(0, 1), bias.flatten()).unflatten(1, (num_heads, num_classes))
            # The gradient of the cross-entropy with respect to the logits, in closed form.
            error = (logits.softmax(dim=2) - _probabilities(targets[rows], num_classes)[:, None]) / len(rows)
            gradient = (error.flatten(1).T @ inputs).view_as(weight)
            weight_step = MOMENTUM * weight_step + gradient + decays[:, None, None] * weight
            bias_step = MOMENTUM * bias_step + error.sum(dim=0)
            lr = rates * (1 + math.cos(math.pi * (epoch * num_batches + i) / (epochs * num_batches))) / 2
            weight -= lr[:, None, None] * weight_step
            bias -= lr[:, None] * bias_step
    return Heads(weight, bias, mean, std)


@torch.no_grad()
def score_heads(heads: Heads, features: Tensor, targets: Tensor) -> tuple[int, list[float]]:
    """Compares heads on features that they were not trained on.

    Args:
        heads: G heads.
        features: [M, D].
        targets: [M] int64 classes, or [M, K] probabilities of the classes.
    Returns:
        The best head, and the accuracy of each: the mean probability of the predicted class. Of equal accuracies the lower
        cross-entropy decides, then the earlier head.
    """
    scores, targets = [], _probabilities(targets, heads.weight.shape[1])
    for head in range(len(heads.weight)):
        logits = heads.logits(features, head)
        hits = targets.gather(1, logits.argmax(dim=1, keepdim=True)).double().mean()
        scores.append((float(hits), -float(F.cross_entropy(logits, targets))))
    return scores.index(max(scores)), [accuracy for accuracy, _ in scores]


def edge_notes(lr: float, lrs: Sequence[float]) -> list[str]:
    """Returns a note if the chosen learning rate is at the end of its list: a better one may lie beyond."""
    if len(lrs) == 1 or min(lrs) < lr < max(lrs):
        return []
    end = "smallest" if lr == min(lrs) else "largest"
    return [f"the sweep chose lr {lr:g}, the {end} of sweep.lrs: a better one may lie beyond, so extend the list"]


def _probabilities(targets: Tensor, num_classes: int) -> Tensor:
    return (F.one_hot(targets, num_classes) if targets.ndim == 1 else targets).float()
