"""The metrics file of an interrupted run, and kNN against a loop."""

import json
import math

import pytest
import torch

from mae_et.evaluation.metrics import knn_predict
from mae_et.storage.metrics_file import MetricsFile, read_jsonl


def steps(path):
    return [line["step"] for line in read_jsonl(path)]


# ---- MetricsFile ----


def test_metrics_file__one_object_a_line_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "loss": 0.5})
    file.write({"step": 2, "loss": 0.25, "note": "ü\n"})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [  # before close: a kill loses nothing
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25, "note": "ü\n"},
    ]
    file.close()
    assert read_jsonl(path)[1]["note"] == "ü\n"


def test_metrics_file__a_resumed_run_drops_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (10, 20, 30, 40):
        file.write({"step": step, "loss": step / 7})
    file.close()
    file = MetricsFile(path, first_step=20)
    assert steps(path) == [10, 20]
    file.write({"step": 30, "loss": 9})
    file.close()
    assert steps(path) == [10, 20, 30]
    assert read_jsonl(path)[0]["loss"] == 10 / 7  # exactly as written
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_file__a_new_run_starts_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n')
    MetricsFile(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3', "{", "\x00\x00"])
def test_metrics_file__a_line_cut_off_by_a_kill(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    assert steps(path) == [1, 2]
    file = MetricsFile(path, first_step=3)
    file.write({"step": 3})
    file.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


# ---- kNN ----


def knn_by_loop(bank, labels, queries, k, temperature):
    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))

    predictions = []
    for query in queries.tolist():
        similarity = [cosine(query, other) for other in bank.tolist()]
        nearest = sorted(range(len(similarity)), key=lambda i, s=similarity: -s[i])[:k]
        votes = {}
        for i in nearest:
            votes[int(labels[i])] = votes.get(int(labels[i]), 0) + math.exp(similarity[i] / temperature)
        predictions.append(max(votes, key=votes.get))
    return predictions


@pytest.mark.parametrize("k", [1, 3, 20, 60])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_predict__equals_a_loop(k, temperature):
    rng = torch.Generator().manual_seed(k)
    bank = torch.randn(60, 8, generator=rng) * torch.rand(60, 1, generator=rng) * 9  # lengths must not matter
    labels = torch.randint(0, 5, (60,), generator=rng)
    queries = torch.randn(40, 8, generator=rng)
    expected = knn_by_loop(bank.double(), labels, queries.double(), k, temperature)
    assert len(set(expected)) > 1
    found = knn_predict(bank, labels, queries, k, temperature)
    assert found.dtype == torch.int64
    assert found.tolist() == expected
    assert knn_predict(bank.half().double(), labels, queries * 1000, k, temperature, num_classes=9).shape == (40,)


def test_knn_predict__nearer_neighbours_weigh_more():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    assert knn_predict(bank, labels, query, k=3, temperature=0.07).tolist() == [0]
    assert knn_predict(bank, labels, query, k=3, temperature=10.0).tolist() == [1]  # nearly a plain majority


def test_knn_predict__in_chunks(monkeypatch):
    """A bank so large that the queries are cut: the same answers in the same order."""
    rng = torch.Generator().manual_seed(0)
    bank, labels = torch.randn(2**15, 2, generator=rng), torch.arange(2**15) % 7
    queries = torch.randn(2500, 2, generator=rng)  # chunks of 1024
    whole = knn_predict(bank, labels, queries, k=5)
    assert len(whole) == 2500
    for start in (0, 1020, 2490):
        part = knn_predict(bank, labels, queries[start : start + 10], k=5)
        assert (whole[start : start + 10] == part).float().mean() >= 0.9  # ties of a sum in another order


@pytest.mark.parametrize("k", [0, -1, 4])
def test_knn_predict__k_out_of_range(k):
    with pytest.raises(ValueError, match="from 1 to 3"):
        knn_predict(torch.randn(3, 2), torch.zeros(3, dtype=torch.int64), torch.randn(1, 2), k)
