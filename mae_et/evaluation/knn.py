"""Classification by nearest neighbours.

Shapes: M bank features, Q queries, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.engine.distributed import World

MAX_SIMILARITIES = 2**25  # held at once, 128 MiB


def knn_predict(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    num_classes: int | None = None,
    world: World | None = None,
) -> dict[int, Tensor]:
    """Classifies queries by their nearest neighbours in cosine similarity, weighted by exp(similarity / temperature).

    Args:
        bank: [M, D] features with known labels.
        labels: [M] int64, 0 or more.
        queries: [Q, D].
        ks: numbers of neighbours, 1 <= k <= M; they share one pass over the bank.
        temperature: of the weights, above 0.
        num_classes: None: from the labels.
        world: splits the queries over its processes, each of which must call this function with the same arguments; the
            result is the same for any number of processes. None: this process classifies all queries.
    Returns:
        [Q] int64 predicted classes for each k. Of equal votes the first class wins.
    Raises:
        ValueError: if a k or the temperature is out of range, or there is not one label for each feature.
    Source: the weighted kNN protocol of Wu et al. (arXiv 1805.01978), k = 20 as in DINO (arXiv 2104.14294).
    """
    ks = sorted(set(ks))
    if not ks or not 1 <= ks[0] <= ks[-1] <= len(bank):
        raise ValueError(
            f"k = {ks} must be from 1 to {len(bank)}, the number of labelled features; lower k or label more images"
        )
    if len(labels) != len(bank):
        raise ValueError(f"{len(labels)} labels for {len(bank)} features; give one for each")
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature} must be above 0")
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    chunk_size = max(1, MAX_SIMILARITIES // len(bank))
    # Whole chunks, so that each matrix product is the same for any number of processes.
    own = queries if world is None else world.share(queries, chunk_size)
    bank, own = F.normalize(bank.float(), dim=1), F.normalize(own.float(), dim=1)
    predictions: dict[int, list[Tensor]] = {k: [labels[:0]] for k in ks}
    for chunk in own.split(chunk_size):
        similarity, neighbours = (chunk @ bank.T).topk(ks[-1], dim=1)
        # Relative to the nearest neighbour's, so that no weight overflows at a low temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(chunk), num_classes, device=bank.device)
        for first, last in zip([0, *ks], ks, strict=False):
            votes.scatter_add_(1, labels[neighbours[:, first:last]], weights[:, first:last])
            predictions[last].append(votes.argmax(dim=1))
    joined = {k: torch.cat(parts) for k, parts in predictions.items()}
    return joined if world is None else {k: world.gather_rows(part) for k, part in joined.items()}
