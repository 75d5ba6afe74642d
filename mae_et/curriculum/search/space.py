"""The space of the Bayesian search: numbers that a sampler suggests -> a curriculum of exactly the budget."""

from __future__ import annotations

from collections.abc import Mapping

from mae_et.config.training import StageConfig
from mae_et.curriculum.search.trial import Space, Trial

MAX_SHARE = 4.0  # the longest stage may have this many times the compute of the shortest


def suggestions(space: Space, has_strength: bool) -> dict[str, tuple[int, int] | tuple[float, float]]:
    """Returns the range of each number that is suggested; whole numbers are indices of candidates.

    Args:
        space: what to choose from.
        has_strength: whether the strength of the augmentation has an effect.
    """
    ranges: dict[str, tuple[int, int] | tuple[float, float]] = {}
    for stage in range(1, space.num_stages):
        ranges[f"candidate_{stage}"] = (0, len(space.candidates) - 1)
    for stage in range(1, space.num_stages + 1):
        ranges[f"share_{stage}"] = (1.0, MAX_SHARE)
        if has_strength:
            ranges[f"strength_{stage}"] = (0.0, 1.0)
    return ranges


def curriculum_of(space: Space, values: Mapping[str, float]) -> tuple[StageConfig, ...]:
    """Returns the curriculum that suggested numbers stand for.

    Bandwidths and strengths are sorted, so that the training never gets easier (a rule of this project); the last stage is
    at full size. The shares of the compute are divided by their sum.
    """
    stages = range(1, space.num_stages + 1)
    bands = sorted(space.candidates[int(values[f"candidate_{stage}"])] for stage in stages[:-1])
    strengths: list[float | None] = [None] * space.num_stages
    if "strength_1" in values:
        strengths = [round(value, 4) for value in sorted(values[f"strength_{stage}"] for stage in stages)]
    total = sum(values[f"share_{stage}"] for stage in stages)
    fractions = [round(values[f"share_{stage}"] / total, 4) for stage in stages]
    fractions[-1] = round(1 - sum(fractions[:-1]), 4)
    return tuple(
        StageConfig(compute_fraction=fraction, bandwidth=band, strength=strength)
        for fraction, band, strength in zip(fractions, [*bands, space.full], strengths, strict=True)
    )


def whole_trial(space: Space, name: str, rows: tuple[StageConfig, ...], seed: int) -> Trial:
    """Returns the training of all rows with the budget of the space."""
    return Trial(f"{name}_seed{seed}", rows, len(rows), space.equivalent_epochs, seed)


def full_size_trial(space: Space, seed: int) -> Trial:
    """Returns a training of the whole budget at full size: the noise and the reference of the Bayesian search."""
    return whole_trial(space, "full-size", (StageConfig(compute_fraction=1.0, bandwidth=space.full),), seed)
