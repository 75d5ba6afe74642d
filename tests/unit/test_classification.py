"""Accuracies, counts and intervals of classification against loops written from their definitions."""

import math
import random

import pytest
import torch

from mae_et.evaluation.classification import confusion_matrix, per_class_accuracy, topk_correct, wilson_interval


def features(num, dim, seed):
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def integers(num, high, seed):
    return torch.randint(0, high, (num,), generator=torch.Generator().manual_seed(seed))


# ---- top-k ----


def test_topk_correct__equals_sorting():
    logits, labels = features(200, 8, 20), integers(200, 8, 21)
    for k in range(1, 9):
        by_loop = [
            int(label) in sorted(range(8), key=lambda c: -float(row[c]))[:k]
            for row, label in zip(logits, labels, strict=True)
        ]
        assert topk_correct(logits, labels, k).tolist() == by_loop
    assert topk_correct(logits, labels, 8).all()


def test_topk_correct__constant_logits_score_like_guessing():
    labels = torch.arange(10)
    for k in (1, 5, 10):
        assert int(topk_correct(torch.zeros(10, 10), labels, k).sum()) == k


def test_topk_correct__nan_is_wrong():
    logits = torch.tensor([[0.0, math.nan], [math.nan, math.nan], [0.0, 1.0], [math.inf, 0.0]])
    assert topk_correct(logits, torch.tensor([0, 1, 1, 0]), 1).tolist() == [False, False, True, True]
    assert topk_correct(logits, torch.tensor([0, 1, 1, 0]), 2).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("labels", "k", "message"),
    [
        ([0, 1], 4, "k = 4 must be from 1 to 3, the number of classes"),
        ([0, 1], 0, "k = 0 must be from 1"),
        ([0, 3], 1, "classes range from 0 to 3, but must be from 0 to 2"),
        ([-1, 0], 1, "Leave out images without a label"),
        ([0, 1, 2], 1, r"must be \[M, C\] and \[M\]"),
    ],
)
def test_topk_correct__faults(labels, k, message):
    with pytest.raises(ValueError, match=message):
        topk_correct(torch.zeros(2, 3), torch.tensor(labels), k)


# ---- confusion ----


def test_confusion_matrix__equals_counting():
    predicted, labels = integers(500, 6, 30), integers(500, 6, 31)
    counts = [[0] * 6 for _ in range(6)]
    for p, t in zip(predicted.tolist(), labels.tolist(), strict=True):
        counts[t][p] += 1
    assert confusion_matrix(predicted, labels, 6).tolist() == counts


def test_confusion_matrix__rows_are_the_truth_and_absent_classes_stay():
    confusion = confusion_matrix(torch.tensor([2, 2, 0]), torch.tensor([0, 0, 0]), 4)
    assert confusion.shape == (4, 4)
    assert confusion[0].tolist() == [1, 0, 2, 0]
    assert confusion[1:].sum() == 0


def test_per_class_accuracy__share_of_each_row():
    accuracy = per_class_accuracy(torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 2]]))
    assert accuracy.dtype == torch.float64
    assert accuracy[[0, 2]].tolist() == [0.75, 0.5]
    assert math.isnan(accuracy[1])  # no image, no accuracy


@pytest.mark.parametrize(("predicted", "labels"), [([0, 2], [0, 1]), ([0, 1], [-1, 0]), ([0], [0, 1])])
def test_confusion_matrix__faults(predicted, labels):
    with pytest.raises(ValueError, match=r"classes range from|must both be"):
        confusion_matrix(torch.tensor(predicted), torch.tensor(labels), 2)


# ---- Wilson ----


@pytest.mark.parametrize(
    ("num_correct", "num"), [(0, 10), (1, 10), (5, 10), (10, 10), (81, 263), (15, 148), (700, 1000)]
)
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_interval__holds_the_shares_that_a_score_test_accepts(num_correct, num, confidence):
    """By definition: p is inside if the observed share is at most z standard errors, of p, away from p."""
    z = {0.8: 1.2815515655446004, 0.95: 1.959963984540054, 0.99: 2.5758293035489004}[confidence]
    low, high = wilson_interval(num_correct, num, confidence)
    assert 0 <= low < high <= 1

    def accepted(p):
        return abs(num_correct / num - p) <= z * math.sqrt(p * (1 - p) / num)

    for end, inwards in ((low, 1e-7), (high, -1e-7)):
        assert accepted(end + inwards)
        assert end in (0, 1) or not accepted(end - inwards)


def test_wilson_interval__published_values():
    """Newcombe (1998), Statistics in Medicine 17, table I, method 3."""
    for (num_correct, num), (low, high) in {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718),
    }.items():  # fmt: skip
        found = wilson_interval(num_correct, num)
        assert found == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval__covers_as_often_as_it_says():
    rng = random.Random(0)
    truth, num = 0.3, 100
    inside = 0
    for _ in range(2000):
        low, high = wilson_interval(sum(rng.random() < truth for _ in range(num)), num)
        inside += low <= truth <= high
    assert 0.93 < inside / 2000 < 0.97


@pytest.mark.parametrize("arguments", [(1, 0), (-1, 10), (11, 10), (1, 10, 0.0), (1, 10, 1.0), (1, 10, 95)])
def test_wilson_interval__faults(arguments):
    with pytest.raises(ValueError, match=r"give at least one image|above 0 and below 1"):
        wilson_interval(*arguments)
