"""Measures of features and classifiers: kNN, accuracies, confusion matrix, interval.

Shapes: M bank features, Q queries, D channels, k neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor


@overload
def knn_predict(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor: ...


@overload
def knn_predict(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: Sequence[int],
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> dict[int, Tensor]: ...


def knn_predict(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor | dict[int, Tensor]:
    """Classifies queries by their nearest neighbours in cosine similarity, weighted by exp(similarity / temperature).

    Args:
        bank: [M, D] features with known labels.
        labels: [M] int64, 0 or more.
        queries: [Q, D].
        k: neighbours, 1 <= k <= M; several numbers share one pass over the bank.
        temperature: of the weights, above 0.
        num_classes: None: from the labels.
    Returns:
        [Q] int64 predicted classes; for several k, that of each k. Of equal votes the first class wins.
    Raises:
        ValueError: if k or the temperature is out of range, or there is not one label for each feature.
    Source: the weighted kNN protocol of Wu et al. (arXiv 1805.01978), k = 20 as in DINO (arXiv 2104.14294).
    """
    ks = sorted({k} if isinstance(k, int) else set(k))
    if not ks or not 1 <= ks[0] <= ks[-1] <= len(bank):
        raise ValueError(
            f"k = {k} must be from 1 to {len(bank)}, the number of labelled features; lower k or label more images"
        )
    if len(labels) != len(bank):
        raise ValueError(f"{len(labels)} labels for {len(bank)} features; give one for each")
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature} must be above 0")
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    predictions: dict[int, list[Tensor]] = {number: [] for number in ks}
    for chunk in queries.split(max(1, 2**25 // len(bank))):  # bounds the similarity matrix to 128 MiB
        similarity, neighbours = (chunk @ bank.T).topk(ks[-1], dim=1)
        # Relative to the nearest neighbour's, so that no weight overflows however low the temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(chunk), num_classes, device=bank.device)
        for first, last in zip([0, *ks], ks, strict=False):
            votes.scatter_add_(1, labels[neighbours[:, first:last]], weights[:, first:last])
            predictions[last].append(votes.argmax(dim=1))
    joined = {number: torch.cat(parts) if parts else labels[:0] for number, parts in predictions.items()}
    return joined[k] if isinstance(k, int) else joined


def topk_correct(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Tells whether the right class is among the k highest.

    Args:
        logits: [M, classes].
        labels: [M] int64.
        k: 1 <= k <= classes.
    Returns:
        [M] bool. Of equal logits the first class goes first, so a constant output scores no better than guessing; a row
        with a NaN is wrong.
    Raises:
        ValueError: if k or a label is out of range, or the numbers of rows differ.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must be [M, classes] and [M]")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k = {k} must be from 1 to {logits.shape[1]}, the number of classes")
    _check_classes(labels, logits.shape[1])
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    return (rank < k) & ~logits.isnan().any(dim=1)


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts the images of each class by what they were taken for.

    Args:
        predicted: [M] int64.
        labels: [M] int64.
        num_classes: C.
    Returns:
        [C, C] int64, a row for each true class, a column for each predicted one.
    Raises:
        ValueError: if a class is out of range, or the numbers differ.
    """
    if predicted.shape != labels.shape or labels.ndim != 1:
        raise ValueError(f"predicted {tuple(predicted.shape)} and labels {tuple(labels.shape)} must both be [M]")
    _check_classes(labels, num_classes)
    _check_classes(predicted, num_classes)
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def per_class_accuracy(confusion: Tensor) -> Tensor:
    """Returns the share of each class's images that was recognised, [C] float64; NaN for a class without images.

    Args:
        confusion: [C, C], as from `confusion_matrix`.
    """
    return confusion.diagonal().double() / confusion.sum(dim=1).double()


def wilson_interval(num_correct: int, num: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the interval in which the accuracy on unlimited images of the same kind lies.

    It covers the chance of these images only, not that of another training.
    Args:
        num_correct: of the images, 0 <= num_correct <= num.
        num: images, at least 1.
        confidence: that the interval holds the truth, above 0 and below 1.
    Returns:
        (low, high), in [0, 1].
    Raises:
        ValueError: if an argument is out of range.
    Source: Wilson (1927), the score interval without continuity correction.
    """
    if not 0 <= num_correct <= num or num < 1:
        raise ValueError(f"{num_correct} correct of {num}: give at least one image, and no more correct than there are")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} must be above 0 and below 1, e.g. 0.95")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, shrink = num_correct / num, 1 + z * z / num
    center = (share + z * z / (2 * num)) / shrink
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num)) / shrink
    # The formula gives exactly 0 and 1 at the ends; rounding does not.
    return 0.0 if num_correct == 0 else center - half, 1.0 if num_correct == num else center + half


def _check_classes(classes: Tensor, num_classes: int) -> None:
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise ValueError(
            f"classes run from {int(classes.min())} to {int(classes.max())}, but must be from 0 to {num_classes - 1}; "
            "-1 means that an image has no label: leave it out"
        )
