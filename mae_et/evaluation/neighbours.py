"""Nearest neighbours and near-duplicates by cosine similarity.

Shapes: M images of a folder, Q queries, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SIMILARITIES = 1 << 24  # of a chunk: 64 MB


def nearest(bank: Tensor, queries: Tensor, k: int, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the most similar rows of a bank.

    Args:
        bank: [M, D].
        queries: [Q, D].
        k: neighbours of each query, at most M less the excluded ones.
        excluded: [Q] int64, a row of the bank that is no neighbour of the query, e.g. the query itself; -1: none.
    Returns:
        [Q, k] cosine similarities, descending, and [Q, k] rows.
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    chunk = max(1, MAX_SIMILARITIES // len(bank))
    similarities, rows = [], []
    for part, skip in zip(queries.split(chunk), excluded.split(chunk), strict=True):
        scores = part @ bank.T
        has = (skip >= 0).nonzero()[:, 0]
        scores[has, skip[has]] = -torch.inf
        best = scores.topk(k, dim=1)
        similarities.append(best.values)
        rows.append(best.indices)
    return torch.cat(similarities), torch.cat(rows)


def similar_pairs(features: Tensor, threshold: float) -> list[tuple[int, int, float]]:
    """Returns all pairs of rows whose cosine similarity reaches a threshold.

    Args:
        features: [M, D].
        threshold: in [-1, 1].
    Returns:
        (first, second, similarity) with first < second, most similar first.
    """
    unit = F.normalize(features.float(), dim=1)
    chunk = max(1, MAX_SIMILARITIES // max(1, len(unit)))
    pairs: list[tuple[int, int, float]] = []
    for start in range(0, len(unit), chunk):
        scores = unit[start : start + chunk] @ unit.T
        upper = torch.ones_like(scores, dtype=torch.bool).triu(start + 1)  # each pair once
        found = ((scores >= threshold) & upper).nonzero()
        values = scores[found[:, 0], found[:, 1]].tolist()
        pairs += [(start + i, j, value) for (i, j), value in zip(found.tolist(), values, strict=True)]
    return sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))
