"""Scores of label maps against loops written from their definitions, and the votes of nearest patches."""

import math

import pytest
import torch
import torch.nn.functional as F

from mae_et.evaluation.knn import knn_votes
from mae_et.evaluation.segmentation import SegmentationScores, boundary_region, label_map
from mae_et.tasks.dense_probe import patch_targets


def boundary_by_loop(mask, unknown, d):
    """Keeps the pixels of a mask whose square of side 2 d + 1 holds a pixel outside of the mask or of the image."""
    height, width = len(mask), len(mask[0])

    def is_inside(y, x):
        return 0 <= y < height and 0 <= x < width and (mask[y][x] or unknown[y][x])

    square = range(-d, d + 1)
    return [
        [bool(mask[y][x]) and not all(is_inside(y + v, x + u) for v in square for u in square) for x in range(width)]
        for y in range(height)
    ]


@pytest.mark.parametrize(("height", "width", "d"), [(16, 20, 1), (60, 88, 2), (3, 140, 3)])
def test_boundary_region__equals_the_loop(height, width, d):
    generator = torch.Generator().manual_seed(height)
    smooth = F.interpolate(torch.rand(2, 1, 4, 5, generator=generator), size=(height, width), mode="bilinear")[:, 0]
    unknown = torch.rand(height, width, generator=generator) < 0.02
    masks = (smooth > 0.5) & ~unknown
    for hidden in (torch.zeros_like(unknown), unknown):
        found = boundary_region(masks, hidden)
        for mask, own in zip(masks, found, strict=True):
            assert own.tolist() == boundary_by_loop(mask.tolist(), hidden.tolist(), d)
    assert not boundary_region(torch.zeros(1, height, width, dtype=torch.bool), unknown).any()


def test_scores__equal_sets_of_pixels():
    generator = torch.Generator().manual_seed(0)
    scores, pairs = SegmentationScores(5), []
    for height, width in ((20, 30), (25, 18)):
        labels = torch.randint(-1, 4, (height, width), generator=generator)  # -1: no label; class 4 does not occur
        predicted = torch.where(torch.rand(height, width, generator=generator) < 0.6, labels.clamp_min(0), 3)
        scores.add(predicted, labels)
        pairs.append((predicted, labels))
    known = [(p[t >= 0], t[t >= 0]) for p, t in pairs]
    p, t = (torch.cat(parts) for parts in zip(*known, strict=True))
    expected = [float(((p == c) & (t == c)).sum() / ((p == c) | (t == c)).sum()) for c in range(4)]
    assert scores.iou()[:4].tolist() == pytest.approx(expected)
    assert math.isnan(scores.iou()[4])
    assert math.isnan(scores.boundary_iou()[4])
    assert scores.accuracy() == pytest.approx(float((p == t).double().mean()))
    for c in range(4):
        regions = [
            [
                torch.tensor(boundary_by_loop(((each == c) & (labels >= 0)).tolist(), (labels < 0).tolist(), 1))
                for each in (predicted, labels)
            ]
            for predicted, labels in pairs
        ]
        both, either = (sum(int(op(a, b).sum()) for a, b in regions) for op in (torch.logical_and, torch.logical_or))
        assert float(scores.boundary_iou()[c]) == pytest.approx(both / either)


def test_scores__a_perfect_map_is_1_and_a_shift_hurts_the_boundary_more():
    labels = torch.zeros(60, 60, dtype=torch.int64)
    labels[20:40, 20:40] = 1
    perfect, shifted = SegmentationScores(2), SegmentationScores(2)
    perfect.add(labels, labels)
    shifted.add(labels.roll(2, 0), labels)
    assert perfect.iou().tolist() == perfect.boundary_iou().tolist() == [1.0, 1.0]
    assert shifted.boundary_iou()[1] < shifted.iou()[1] < 1


def test_label_map__is_the_best_of_bilinear_scores():
    scores = torch.randn(37, 3, 4, generator=torch.Generator().manual_seed(1))  # more classes than a chunk
    large = F.interpolate(scores[None], size=(25, 31), mode="bilinear", align_corners=False)[0]
    assert torch.equal(label_map(scores, (25, 31)), large.argmax(0))
    assert not label_map(torch.zeros(3, 2, 2), (4, 4)).any()


def test_knn_votes__equal_the_loop():
    generator = torch.Generator().manual_seed(2)
    bank, queries = torch.randn(40, 5, generator=generator), torch.randn(7, 5, generator=generator)
    targets = torch.rand(40, 3, generator=generator).softmax(1)
    found = knn_votes(bank, targets, queries, 6, 0.2)
    for query, own in zip(queries, found, strict=True):
        similarity = F.cosine_similarity(query[None], bank)
        nearest = similarity.argsort(descending=True)[:6]
        weights = [math.exp(float(similarity[i]) / 0.2) for i in nearest]
        expected = sum(w * targets[i] for w, i in zip(weights, nearest, strict=True)) / sum(weights)
        torch.testing.assert_close(own, expected)
    with pytest.raises(ValueError, match="must be from 1 to 40"):
        knn_votes(bank, targets, queries, 41, 0.2)


def test_patch_targets__are_shares_of_labelled_pixels():
    labels = torch.full((8, 8), -1, dtype=torch.int16)
    labels[:4, :4], labels[:2, 4:], labels[2:4, 4:6] = 2, 1, 0
    targets, labelled = patch_targets(labels, (8, 8), 4, 3)
    assert targets.tolist() == [[0, 0, 1], [pytest.approx(1 / 3), pytest.approx(2 / 3), 0], [0, 0, 0], [0, 0, 0]]
    assert labelled.tolist() == [1, 0.75, 0, 0]
    halved = patch_targets(labels.repeat_interleave(3, 0).repeat_interleave(2, 1), (8, 8), 4, 3)  # 24 x 16 px
    assert torch.equal(halved[0], targets)
    wide = patch_targets(labels.repeat_interleave(2, 1), (8, 16), 4, 3)[0]  # two columns of patches for each of before
    assert wide[:2].tolist() == [[0, 0, 1], [0, 0, 1]]
