"""kNN with several k, and the counts and intervals of classification, against loops written from their definitions."""

import math
import random

import pytest
import torch

from mae_et.evaluation.metrics import confusion_matrix, knn_predict, per_class_accuracy, topk_correct, wilson_interval


def features(num, dim, seed):
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def integers(num, high, seed):
    return torch.randint(0, high, (num,), generator=torch.Generator().manual_seed(seed))


def knn_by_loop(bank, labels, queries, k, temperature):
    """One query after the other, in float64: cosine similarities sorted, votes added up in a dict."""
    predictions = []
    for query in queries.double():
        similarities = [float(query @ row / (query.norm() * row.norm())) for row in bank.double()]
        nearest = sorted(range(len(bank)), key=lambda i: -similarities[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            votes[int(labels[i])] = votes.get(int(labels[i]), 0.0) + math.exp(similarities[i] / temperature)
        predictions.append(max(votes, key=lambda c: votes[c]))
    return predictions


# ---- kNN ----


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_predict__several_k_equal_the_loop(temperature):
    bank, labels, queries = features(60, 5, 0), integers(60, 7, 1), features(25, 5, 2)
    found = knn_predict(bank, labels, queries, [60, 1, 5, 20], temperature)
    assert sorted(found) == [1, 5, 20, 60]
    for k, predicted in found.items():
        assert predicted.dtype == torch.int64
        assert predicted.tolist() == knn_by_loop(bank, labels, queries, k, temperature), k
    assert len({tuple(p.tolist()) for p in found.values()}) > 1  # k matters here


def test_knn_predict__an_int_gives_a_tensor_and_one_of_several_the_same():
    bank, labels, queries = features(40, 4, 3), integers(40, 3, 4), features(9, 4, 5)
    single = knn_predict(bank, labels, queries, k=5)
    assert isinstance(single, torch.Tensor)
    assert torch.equal(single, knn_predict(bank, labels, queries, (5, 3, 5))[5])


def test_knn_predict__chunks_change_nothing(monkeypatch):
    bank, labels, queries = features(30, 4, 6), integers(30, 3, 7), features(50, 4, 8)
    whole = knn_predict(bank, labels, queries, [1, 7])
    sizes = []
    split = torch.Tensor.split

    def small_chunks(tensor, size, *args):
        sizes.append(size)
        return split(tensor, 8, *args)

    monkeypatch.setattr(torch.Tensor, "split", small_chunks)
    chunked = knn_predict(bank, labels, queries, [1, 7])
    assert sizes == [2**25 // 30]  # the similarities of a chunk: at most 2^25 numbers
    assert all(torch.equal(whole[k], chunked[k]) for k in whole)


def test_knn_predict__low_temperature_is_the_nearest_neighbour():
    bank, labels, queries = features(30, 4, 9), integers(30, 5, 10), features(20, 4, 11)
    both = knn_predict(bank, labels, queries, [1, 30], temperature=1e-4)  # exp(1 / 1e-4) is beyond any float
    assert torch.equal(both[1], both[30])


def test_knn_predict__classes_beyond_the_bank():
    bank, queries = features(6, 3, 12), features(4, 3, 13)
    predicted = knn_predict(bank, torch.tensor([0, 1, 0, 1, 0, 1]), queries, 3, num_classes=9)
    assert set(predicted.tolist()) <= {0, 1}


@pytest.mark.parametrize("k", [0, -1, 11, [5, 11], [0, 5], []])
def test_knn_predict__k_out_of_range(k):
    with pytest.raises(ValueError, match=r"must be from 1 to 10, the number of labelled features; lower k"):
        knn_predict(features(10, 3, 0), integers(10, 2, 0), features(2, 3, 1), k)


def test_knn_predict__other_faults():
    bank, queries = features(10, 3, 0), features(2, 3, 1)
    with pytest.raises(ValueError, match="9 labels for 10 features"):
        knn_predict(bank, integers(9, 2, 0), queries, 3)
    with pytest.raises(ValueError, match="temperature = 0 must be above 0"):
        knn_predict(bank, integers(10, 2, 0), queries, 3, temperature=0)


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
        ([0, 3], 1, "classes run from 0 to 3, but must be from 0 to 2"),
        ([-1, 0], 1, "-1 means that an image has no label"),
        ([0, 1, 2], 1, r"must be \[M, classes\] and \[M\]"),
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
    with pytest.raises(ValueError, match=r"classes run from|must both be"):
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
