"""What a run writes about itself, and how good features are.

Shapes: M bank features, Q queries, D channels, k neighbours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.checkpoint import atomic_path


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each with its `step`.

    Args:
        path: where.
        first_step: lines of later steps are dropped: a resumed run writes them anew.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        kept = [line for line in read_jsonl(path) if line["step"] <= first_step] if path.exists() else []
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed by `close`)

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics file; a last line cut off by a kill is passed over."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def knn_predict(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """Classifies queries by their nearest neighbours in cosine similarity, weighted by exp(similarity / temperature).

    Args:
        bank: [M, D] features with known labels.
        labels: [M] int64.
        queries: [Q, D].
        k: neighbours, 1 <= k <= M.
        temperature: of the weights.
        num_classes: None: from the labels.
    Returns:
        [Q] int64 predicted classes.
    Raises:
        ValueError: if k is out of range.
    Source: the weighted kNN protocol of Wu et al. (arXiv 1805.01978), k = 20 as in DINO (arXiv 2104.14294).
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k = {k} must be from 1 to {len(bank)}, the number of labelled features")
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    predictions = []
    for chunk in queries.split(max(1, 2**25 // len(bank))):  # bounds the similarity matrix to 128 MiB
        similarity, neighbours = (chunk @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(chunk), num_classes, device=bank.device)
        votes.scatter_add_(1, labels[neighbours], (similarity / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)
