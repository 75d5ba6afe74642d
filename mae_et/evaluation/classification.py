"""Accuracies of a classifier and the files that report them.

Shapes: M images, C classes.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from mae_et.evaluation.pictures import draw_confusion
from mae_et.storage.atomic import atomic_path


def write_verdict(
    logits: Tensor, labels: Tensor, class_names: list[str], work_dir: Path, top5: bool = True, num_draws: int = 1
) -> dict[str, Any]:
    """Writes per_class.csv, confusion.csv and confusion.png and returns the accuracies.

    Args:
        logits: [M, C].
        labels: [M] int64.
        class_names: in the order of the labels.
        work_dir: the folder to write to.
        top5: whether the logits rank more than the first class. Top-5 accuracy is given from six classes on.
        num_draws: times that the images occur, one after the other, each time with the logits of another training. Accuracies
            are means over them; confusion.csv holds sums.
    """
    logits, labels = logits.cpu(), labels.cpu()
    num_classes = len(class_names)
    correct = int(topk_correct(logits, labels).sum())
    confusion = confusion_matrix(logits.argmax(dim=1), labels, num_classes)
    shares = per_class_accuracy(confusion).tolist()
    with atomic_path(work_dir / "per_class.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "name", "num_images", "accuracy"])
        for i, (name, share) in enumerate(zip(class_names, shares, strict=True)):
            rows.writerow([i, name, int(confusion[i].sum()) // num_draws, "" if math.isnan(share) else f"{share:.4f}"])
    with atomic_path(work_dir / "confusion.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["true \\ predicted", *class_names])
        rows.writerows([name, *counts] for name, counts in zip(class_names, confusion.tolist(), strict=True))
    draw_confusion(confusion, class_names, work_dir / "confusion.png")
    return {
        "top1": correct / len(labels),
        "top1_interval_95": wilson_interval(correct / num_draws, len(labels) // num_draws),
        "top5": float(topk_correct(logits, labels, 5).double().mean()) if top5 and num_classes > 5 else None,
        "num_val": len(labels) // num_draws,
        "num_classes": num_classes,
    }


def topk_correct(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Checks for each image whether its class is among the k highest logits.

    Args:
        logits: [M, C].
        labels: [M] int64.
        k: 1 <= k <= C.
    Returns:
        [M] bool. Equal logits are ranked by class index, so a constant output is no better than a guess. A row with a NaN
        is wrong.
    Raises:
        ValueError: if k or a label is out of range, or the numbers of rows differ.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must be [M, C] and [M]")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k = {k} must be from 1 to {logits.shape[1]}, the number of classes")
    _check_classes(labels, logits.shape[1])
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    return (rank < k) & ~logits.isnan().any(dim=1)


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts the images of each true class by predicted class.

    Args:
        predicted: [M] int64.
        labels: [M] int64.
        num_classes: C.
    Returns:
        [C, C] int64, a row for each true class, a column for each predicted one.
    Raises:
        ValueError: if a class is out of range, or the lengths differ.
    """
    if predicted.shape != labels.shape or labels.ndim != 1:
        raise ValueError(f"predicted {tuple(predicted.shape)} and labels {tuple(labels.shape)} must both be [M]")
    _check_classes(labels, num_classes)
    _check_classes(predicted, num_classes)
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def per_class_accuracy(confusion: Tensor) -> Tensor:
    """Returns the accuracy within each class.

    Args:
        confusion: [C, C], as from `confusion_matrix`.
    Returns:
        [C] float64; NaN for a class without images.
    """
    return confusion.diagonal().double() / confusion.sum(dim=1).double()


def wilson_interval(num_correct: float, num: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns a confidence interval for the accuracy on unlimited images of the same kind.

    The interval covers the sampling of the images only, not the spread over training runs.

    Args:
        num_correct: 0 <= num_correct <= num; not whole if it is a mean.
        num: number of images, at least 1.
        confidence: probability that the interval covers the true accuracy, above 0 and below 1.
    Returns:
        (low, high), in [0, 1].
    Raises:
        ValueError: if an argument is out of range.
    Source: Wilson (1927), the score interval without continuity correction.
    """
    if not 0 <= num_correct <= num or num < 1:
        raise ValueError(
            f"{num_correct} correct of {num} images: give at least one image, and at most as many correct ones"
        )
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
            f"classes range from {int(classes.min())} to {int(classes.max())}, but must be from 0 to {num_classes - 1}. "
            "Leave out images without a label (-1)"
        )
