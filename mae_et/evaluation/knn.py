"""Classification by nearest neighbours. Each process holds a part of the bank, and none holds all of it.

Shapes: M bank features of all processes, m of this process, Q queries, n of a chunk, D channels, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.engine.distributed import World

MAX_SIMILARITIES = 2**25  # held at once, 128 MiB
BLOCK_SIZE = 256  # bank features of a matrix product, as many as images of a batch of `collect`
_MAX_CHUNK = 4096  # queries
_NO_NEIGHBOUR = torch.iinfo(torch.int64).min


def knn_predict(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    num_classes: int | None = None,
    world: World | None = None,
    block_sizes: Sequence[int] | None = None,
) -> dict[int, Tensor]:
    """Classifies queries by their nearest neighbours in cosine similarity, weighted by exp(similarity / temperature).

    Args:
        bank: [m, D] features of this process. The parts of all processes in rank order are the bank.
        labels: [M] int64, 0 or more, of the whole bank; the same on each process.
        queries: [Q, D]; the same on each process.
        ks: numbers of neighbours, 1 <= k <= M; they share one pass over the bank.
        temperature: of the weights, above 0.
        num_classes: None: from the labels.
        world: the processes, each of which must call this function. None: this process holds the whole bank.
        block_sizes: the bank is multiplied in blocks of these sizes, each at most `BLOCK_SIZE`. The result is the same for
            any number of processes if they cut the bank at the same blocks, as `Collected.batch_sizes` does. None: blocks
            of `BLOCK_SIZE`.
    Returns:
        [Q] int64 predicted classes for each k, on each process. Of equal votes the first class wins; of equal similarities
        the first bank feature.
    Raises:
        ValueError: if a k or the temperature is out of range, or there is not one label for each feature.
    Source: the weighted kNN protocol of Wu et al. (arXiv 1805.01978), k = 20 as in DINO (arXiv 2104.14294).
    """
    sizes = [len(bank)] if world is None else world.gather(len(bank))
    first = sum(sizes[: 0 if world is None else world.rank])
    ks = sorted(set(ks))
    if not ks or not 1 <= ks[0] <= ks[-1] <= sum(sizes):
        raise ValueError(
            f"k = {ks} must be from 1 to {sum(sizes)}, the number of labelled features; lower k or label more images"
        )
    if len(labels) != sum(sizes):
        raise ValueError(f"{len(labels)} labels for {sum(sizes)} features; give one for each")
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature} must be above 0")
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    groups = list(_groups(bank, first, block_sizes))
    predictions: dict[int, list[Tensor]] = {k: [labels[:0]] for k in ks}
    for chunk in F.normalize(queries.float(), dim=1).split(_chunk_size()):
        similarity, neighbours = _nearest(chunk, groups, ks[-1], world)
        # Relative to the nearest neighbour's, so that no weight overflows at a low temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(chunk), num_classes, device=chunk.device)
        for low, high in zip([0, *ks], ks, strict=False):
            votes.scatter_add_(1, labels[neighbours[:, low:high]], weights[:, low:high])
            predictions[high].append(votes.argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in predictions.items()}


def knn_votes(bank: Tensor, targets: Tensor, queries: Tensor, k: int, temperature: float) -> Tensor:
    """Returns the votes of the nearest neighbours in cosine similarity, weighted by exp(similarity / temperature).

    Args:
        bank: [M, D] features, all of them on this process.
        targets: [M, K] probabilities of the classes of each bank feature.
        queries: [Q, D].
        k: number of neighbours, 1 <= k <= M.
        temperature: of the weights, above 0.
    Returns:
        [Q, K]; each row adds up to 1.
    Raises:
        ValueError: if k is out of range.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k = {k} must be from 1 to {len(bank)}, the number of features")
    groups, votes = list(_groups(bank, 0, None)), [targets.new_zeros(0, targets.shape[1])]
    for chunk in F.normalize(queries.float(), dim=1).split(_chunk_size()):
        similarity, neighbours = _nearest(chunk, groups, k, None)
        weights = (similarity / temperature).softmax(dim=1)
        votes.append(torch.einsum("nk,nkc->nc", weights, targets[neighbours]))
    return torch.cat(votes)


def _chunk_size() -> int:
    return max(1, min(_MAX_CHUNK, MAX_SIMILARITIES // BLOCK_SIZE))


def _groups(bank: Tensor, first: int, block_sizes: Sequence[int] | None) -> Iterator[tuple[tuple[Tensor, ...], int]]:
    """Yields the bank in groups of blocks that are multiplied before neighbours are picked, with their first numbers."""
    blocks = bank.split(BLOCK_SIZE if block_sizes is None else list(block_sizes)) if len(bank) else ()
    num_blocks = max(1, MAX_SIMILARITIES // (_chunk_size() * BLOCK_SIZE))
    for start in range(0, len(blocks), num_blocks):
        group = blocks[start : start + num_blocks]
        yield group, first
        first += sum(map(len, group))


def _nearest(
    queries: Tensor, groups: Sequence[tuple[tuple[Tensor, ...], int]], k: int, world: World | None
) -> tuple[Tensor, Tensor]:
    """Finds the k nearest bank features of all processes.

    Returns:
        Similarities [n, k] float32, descending, and numbers [n, k] int64 of the bank features.
    """
    best = torch.full((len(queries), k), _NO_NEIGHBOUR, device=queries.device)
    for blocks, first in groups:
        # One product for each block: products of the same shape give the same bits for any number of processes.
        similarity = torch.cat([queries @ F.normalize(block.float(), dim=1).T for block in blocks], dim=1)
        best = torch.cat([best, _largest(similarity, first, k)], dim=1).topk(k, dim=1).values
    if world is not None and world.size > 1:
        parts = world.gather_rows(best).view(world.size, len(queries), k)
        best = parts.transpose(0, 1).reshape(len(queries), -1).topk(k, dim=1).values
    return _ordered((best >> 32).to(torch.int32)).view(torch.float32), 0xFFFFFFFF - (best & 0xFFFFFFFF)


def _largest(similarity: Tensor, first: int, k: int) -> Tensor:
    """Returns the keys [n, min(k, b)] of the nearest features of a group, whose first number is given."""
    k = min(k, similarity.shape[1])
    values, columns = similarity.topk(k, dim=1)
    keys = _keys(values, first + columns)
    # topk takes any of several equal values; where some were left, all are compared by their keys.
    tied = (similarity >= values[:, -1:]).sum(dim=1) > k
    if tied.any():
        numbers = torch.arange(first, first + similarity.shape[1], device=similarity.device)
        keys[tied] = _keys(similarity[tied], numbers).topk(k, dim=1).values
    return keys


def _keys(similarity: Tensor, numbers: Tensor) -> Tensor:
    """Returns int64 that sort by similarity (float32), and equal ones by their number from the last to the first.

    With them the nearest k are the same for any groups in which they are picked.
    """
    return (_ordered(similarity.contiguous().view(torch.int32)).long() << 32) | (0xFFFFFFFF - numbers)


def _ordered(bits: Tensor) -> Tensor:
    """Maps the bits of float32 to int32 of the same order, and back."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
