"""kNN against a loop written from its definition."""

import math

import pytest
import torch

from mae_et.evaluation import knn
from mae_et.evaluation.knn import knn_predict


def features(num, dim, seed):
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def integers(num, high, seed):
    return torch.randint(0, high, (num,), generator=torch.Generator().manual_seed(seed))


def knn_by_loop(bank, labels, queries, k, temperature):
    """Classifies one query after the other, in float64: cosine similarities sorted, votes added up in a dict."""
    predictions = []
    for query in queries.double():
        similarities = [float(query @ row / (query.norm() * row.norm())) for row in bank.double()]
        nearest = sorted(range(len(bank)), key=lambda i: -similarities[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            votes[int(labels[i])] = votes.get(int(labels[i]), 0.0) + math.exp(similarities[i] / temperature)
        predictions.append(max(votes, key=lambda c: votes[c]))
    return predictions


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_predict__several_k_equal_the_loop(temperature):
    bank, labels, queries = features(60, 5, 0), integers(60, 7, 1), features(25, 5, 2)
    bank *= torch.rand(60, 1) * 9  # lengths must not matter
    found = knn_predict(bank, labels, queries, [60, 1, 5, 20], temperature)
    assert sorted(found) == [1, 5, 20, 60]
    for k, predicted in found.items():
        assert predicted.dtype == torch.int64
        assert predicted.tolist() == knn_by_loop(bank, labels, queries, k, temperature), k
    assert len({tuple(p.tolist()) for p in found.values()}) > 1  # k matters here


def test_knn_predict__one_k_gives_the_same_as_among_others():
    bank, labels, queries = features(40, 4, 3), integers(40, 3, 4), features(9, 4, 5)
    assert torch.equal(knn_predict(bank, labels, queries, [5])[5], knn_predict(bank, labels, queries, (5, 3, 5))[5])


def test_knn_predict__nearer_neighbours_weigh_more():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    assert knn_predict(bank, labels, query, [3], temperature=0.07)[3].tolist() == [0]
    assert knn_predict(bank, labels, query, [3], temperature=10.0)[3].tolist() == [1]  # nearly a plain majority


def test_knn_predict__bounds_the_similarity_matrix(monkeypatch):
    bank, labels, queries = features(30, 4, 6), integers(30, 3, 7), features(50, 4, 8)
    whole = knn_predict(bank, labels, queries, [1, 7])
    sizes = []
    largest = knn._largest
    monkeypatch.setattr(knn, "_largest", lambda found, *rest: sizes.append(found.shape) or largest(found, *rest))
    monkeypatch.setattr(knn, "_MAX_CHUNK", 20)
    monkeypatch.setattr(knn, "BLOCK_SIZE", 4)
    monkeypatch.setattr(knn, "MAX_SIMILARITIES", 250)
    chunked = knn_predict(bank, labels, queries, [1, 7])
    assert sizes == ([(20, 12)] * 2 + [(20, 6)]) * 2 + [(10, 12)] * 2 + [(10, 6)]
    assert all(torch.equal(whole[k], chunked[k]) for k in whole)


@pytest.mark.parametrize("block_sizes", [[30], [1] * 30, [7, 0, 13, 10]])
def test_knn_predict__of_equal_similarities_the_first_is_taken(block_sizes, monkeypatch):
    """Each feature of the bank occurs three times with different labels, so the k-th neighbour is always one of several."""
    monkeypatch.setattr(knn, "MAX_SIMILARITIES", 60)
    bank = features(10, 4, 14).repeat(3, 1)
    labels, queries = torch.arange(30), bank[:10]
    found = knn_predict(bank, labels, queries, [1, 2], temperature=1.0, block_sizes=block_sizes)
    assert found[1].tolist() == found[2].tolist() == list(range(10))
    similarity, numbers = knn._nearest(
        queries / queries.norm(dim=1, keepdim=True), list(knn._groups(bank, 0, None)), 2, None
    )
    assert numbers.tolist() == [[i, i + 10] for i in range(10)]
    assert torch.allclose(similarity, torch.ones(10, 2))


def test_keys__sort_as_the_similarities_and_give_them_back():
    similarity = torch.tensor([[0.5, -0.5, 0.0, 1.0, -1.0, 1e-9, -1e-9, 0.25]])
    keys = knn._keys(similarity, torch.arange(2**31, 2**31 + 8))
    order = keys.argsort(descending=True)
    assert order.tolist() == similarity.argsort(descending=True).tolist()
    assert torch.equal(knn._ordered((keys >> 32).int()).view(torch.float32), similarity)
    assert (0xFFFFFFFF - (keys & 0xFFFFFFFF)).tolist() == [list(range(2**31, 2**31 + 8))]


def test_knn_predict__no_queries():
    assert knn_predict(features(3, 2, 0), integers(3, 2, 0), features(0, 2, 0), [2])[2].shape == (0,)


def test_knn_predict__low_temperature_is_the_nearest_neighbour():
    bank, labels, queries = features(30, 4, 9), integers(30, 5, 10), features(20, 4, 11)
    both = knn_predict(bank, labels, queries, [1, 30], temperature=1e-4)  # exp(1 / 1e-4) is beyond any float
    assert torch.equal(both[1], both[30])


def test_knn_predict__classes_beyond_the_bank():
    bank, queries = features(6, 3, 12), features(4, 3, 13)
    predicted = knn_predict(bank, torch.tensor([0, 1, 0, 1, 0, 1]), queries, [3], num_classes=9)[3]
    assert set(predicted.tolist()) <= {0, 1}


@pytest.mark.parametrize("ks", [[0], [-1], [11], [5, 11], [0, 5], []])
def test_knn_predict__k_out_of_range(ks):
    with pytest.raises(ValueError, match=r"must be from 1 to 10, the number of labelled features; lower k"):
        knn_predict(features(10, 3, 0), integers(10, 2, 0), features(2, 3, 1), ks)


def test_knn_predict__other_faults():
    bank, queries = features(10, 3, 0), features(2, 3, 1)
    with pytest.raises(ValueError, match="9 labels for 10 features"):
        knn_predict(bank, integers(9, 2, 0), queries, [3])
    with pytest.raises(ValueError, match="temperature = 0 must be above 0"):
        knn_predict(bank, integers(10, 2, 0), queries, [3], temperature=0)
