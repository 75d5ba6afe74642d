"""Algorithm 1 of EfficientTrain: full runs, stages from last to first, the smallest bandwidth that keeps the score."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

from mae_et.curriculum.search.trial import Decision, Found, Search, Space, Trial, margin_of_noise


def backward(space: Space, tolerance: float | None = None) -> Search:
    """Searches the smallest bandwidths whose full training still reaches the score of the baseline.

    Stages have equal parts of the epochs. All start at full size, and the last stays there. For each other stage, from the
    last to the first, the bandwidths of it and of all stages before it are lowered together, a candidate at a time, until
    the first failure. The baseline is trained with `space.noise_seeds`, which gives its mean score and the noise.

    Args:
        space: what to choose from.
        tolerance: how far a mean score may fall below the baseline's; None: the margin of the noise.
    Source: EfficientTrain (arXiv 2211.09703), Algorithm 1. The tolerance is this project's: the paper compares with >=,
    but the noise of an accuracy is as large as the differences.
    """
    bandwidths = [space.full] * space.num_stages
    scores = yield [space.equal_epochs(bandwidths, seed) for seed in space.noise_seeds]
    noise = statistics.stdev(scores.values())
    margin = margin_of_noise(noise, len(space.seeds), len(space.noise_seeds)) if tolerance is None else tolerance
    limit = statistics.mean(scores.values()) - margin
    decisions: list[Decision] = []
    for stage in range(space.num_stages - 1, 0, -1):
        tried: dict[int, list[float]] = {}
        for band in [band for band in reversed(space.candidates) if band < bandwidths[stage - 1]]:
            trials = [space.equal_epochs([band] * stage + bandwidths[stage:], seed) for seed in space.seeds]
            scores = yield trials
            tried[band] = [scores[trial.name] for trial in trials]
            if statistics.mean(tried[band]) < limit:
                break
            bandwidths[:stage] = [band] * stage
        chosen = bandwidths[stage - 1]
        failed = [band for band in tried if band < chosen]
        why = f"{failed[0]} falls below {limit:.4g}" if failed else "there is no smaller candidate"
        decisions.append(Decision(stage=stage, scores=tried, limit=limit, chosen=chosen, why=why))
    found = space.equal_epochs(bandwidths, space.seeds[0])
    return Found(
        rows=found.rows,
        equivalent_epochs=found.equivalent_epochs,
        noise=noise,
        margin=margin,
        decisions=tuple(decisions),
        trials=tuple(space.equal_epochs(bandwidths, seed).name for seed in space.seeds),
        why="; ".join(f"stage {one.stage}: {one.why}" for one in decisions),
    )


def possible_runs(start: Callable[[], Search]) -> Iterator[list[Trial]]:
    """Yields the trials of a search for each way in which its candidates can pass or fail.

    Args:
        start: starts the search; it must not depend on scores but by comparing them with those of its first trials.
    """
    paths: list[tuple[bool, ...]] = [()]
    while paths:
        path = paths.pop()
        search, trials, is_done = start(), dict[str, Trial](), False
        batch = next(search)
        trials |= {trial.name: trial for trial in batch}
        scores = dict.fromkeys(trials, 0.0)  # the baseline
        for passes in (*path, None):
            try:
                batch = search.send(scores)
            except StopIteration:
                is_done = True
                break
            trials |= {trial.name: trial for trial in batch}
            scores = {trial.name: 0.0 if passes else -1e30 for trial in batch}
        if is_done:
            yield list(trials.values())
        else:
            paths += [(*path, False), (*path, True)]
