"""Measures of label maps: mean IoU, pixel accuracy and Boundary IoU.

Shapes: H, W px, K classes, h, w grid of patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.evaluation.classification import confusion_matrix

BOUNDARY_RATIO = 0.02  # width of the boundary region over the diagonal of the image, as published
CLASS_CHUNK = 16  # classes that are enlarged at once, which bounds the memory of large masks


def label_map(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarges the scores of a grid bilinearly and takes the best class of each pixel.

    Args:
        scores: [K, h, w].
        size: (H, W).
    Returns:
        [H, W] int64; of equal scores the first class.
    """
    best = torch.full(size, -torch.inf, device=scores.device)
    labels = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for i, part in enumerate(scores.split(CLASS_CHUNK)):
        large = F.interpolate(part[None], size=size, mode="bilinear", align_corners=False)[0]
        value, label = large.max(dim=0)
        labels = torch.where(value > best, label + i * CLASS_CHUNK, labels)
        best = torch.maximum(best, value)
    return labels


class SegmentationScores:
    """Counts pixels over images; the scores are of all images together, as in mmsegmentation.

    Pixels without a label are not counted. The mean is over the classes that occur among labels or predictions.

    Args:
        num_classes: K.
        ignore: label of a pixel that is not counted.
    """

    def __init__(self, num_classes: int, ignore: int = -1) -> None:
        self.num_classes, self.ignore = num_classes, ignore
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.boundary = torch.zeros(2, num_classes, dtype=torch.int64)  # intersection, union

    def add(self, predicted: Tensor, labels: Tensor) -> None:
        """Counts one image.

        Args:
            predicted: [H, W] int64, 0 to K - 1.
            labels: [H, W] int64, 0 to K - 1 or `ignore`.
        """
        known = labels != self.ignore
        self.confusion += confusion_matrix(predicted[known], labels[known], self.num_classes).cpu()
        present = torch.cat([predicted[known], labels[known]]).unique()
        for part in present.split(CLASS_CHUNK):
            truth, guess = ((each == part[:, None, None]) & known for each in (labels, predicted))
            truth, guess = boundary_region(truth, ~known), boundary_region(guess, ~known)
            counts = torch.stack([(truth & guess).sum((1, 2)), (truth | guess).sum((1, 2))])
            self.boundary[:, part.cpu()] += counts.cpu()

    def iou(self) -> Tensor:
        """Returns the IoU of each class, [K] float64; NaN where neither label nor prediction has it."""
        hits = self.confusion.diagonal().double()
        return hits / (self.confusion.sum(0) + self.confusion.sum(1) - hits)

    def boundary_iou(self) -> Tensor:
        """Returns the Boundary IoU of each class, [K] float64; NaN where neither label nor prediction has it."""
        return self.boundary[0].double() / self.boundary[1]

    def accuracy(self) -> float:
        """Returns the fraction of labelled pixels that are right; NaN without any."""
        return float(self.confusion.diagonal().sum().double() / self.confusion.sum())


def boundary_region(masks: Tensor, unknown: Tensor) -> Tensor:
    """Returns the pixels of masks that are near their contour.

    These are the pixels whose square of side 2 d + 1 is not wholly inside the mask, with d = 2% of the image's diagonal,
    rounded, at least 1. The border of the image is a contour. Unlabelled pixels count as inside, so that no contour is made
    where the truth is not known; without unlabelled pixels this is the published definition.

    Args:
        masks: [n, H, W] bool.
        unknown: [H, W] bool, the unlabelled pixels; in no mask.
    Returns:
        [n, H, W] bool.
    Source: Boundary IoU (arXiv 2103.16562), and its code for d and the shape of the erosion.
    """
    height, width = masks.shape[-2:]
    d = max(1, round(BOUNDARY_RATIO * (height**2 + width**2) ** 0.5))
    inside = masks | unknown
    for axis in (1, 2):
        inside = _eroded(inside.transpose(axis, 2), d).transpose(axis, 2)
    return masks & ~inside


def _eroded(inside: Tensor, d: int) -> Tensor:
    """Keeps the places of the last axis whose neighbours up to distance d are all set; there is nothing beyond the ends."""
    side, result = 2 * d + 1, torch.zeros_like(inside)
    if inside.shape[-1] >= side:
        counts = F.pad(inside.int().cumsum(-1), (1, 0))
        result[..., d : inside.shape[-1] - d] = counts[..., side:] - counts[..., :-side] == side
    return result
