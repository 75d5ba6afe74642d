"""Algorithm 2 of EfficientTrain++: stages from first to last with equal compute, the best branch of each is kept."""

from __future__ import annotations

import statistics

from mae_et.curriculum.search.trial import Decision, Found, Search, Space, choose_nearest, margin_of_noise


def sequential(space: Space) -> Search:
    """Searches the bandwidths of all stages but the last, which is at full size.

    From the checkpoint of the stages chosen so far, one branch is trained for each candidate and seed. The branch is scored
    after a short fine-tuning at full size; the next stage starts from its checkpoint before that. The noise is measured
    first, on branches of the first stage at the largest candidate.

    Source: EfficientTrain++ (arXiv 2405.08768), Algorithm 2. The paper's code is not public; repeats, the noise and the
    rule for ties are this project's.
    """
    largest = space.candidates[-1]
    scores = yield [space.branch([largest], seed) for seed in space.noise_seeds]
    noise = statistics.stdev(scores.values())
    margin = margin_of_noise(noise, len(space.seeds), len(space.seeds))
    chosen: tuple[int, ...] = ()
    decisions: list[Decision] = []
    for stage in range(1, space.num_stages):
        branches = {band: [space.branch([*chosen, band], seed) for seed in space.seeds] for band in space.candidates}
        scores = yield [trial for trials in branches.values() for trial in trials]
        by_band = {band: [scores[trial.name] for trial in trials] for band, trials in branches.items()}
        previous = chosen[-1] if chosen else space.candidates[0]
        decisions.append(choose_nearest(stage, by_band, margin, previous))
        chosen = (*chosen, decisions[-1].chosen)
    last = [space.branch([*chosen, space.full], seed) for seed in space.seeds]
    yield last
    return Found(
        rows=last[0].rows,
        equivalent_epochs=space.equivalent_epochs,
        noise=noise,
        margin=margin,
        decisions=tuple(decisions),
        trials=tuple(trial.name for trial in last),
        why="; ".join(f"stage {one.stage}: {one.why}" for one in decisions),
    )
