"""What a search trains and decides: trials, the space they come from, the noise of the score, and the rule for ties."""

from __future__ import annotations

import math
import statistics
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from mae_et.config.data import shorter_side
from mae_et.config.training import StageConfig
from mae_et.curriculum.presets import bandwidths_at
from mae_et.errors import ConfigError
from mae_et.models.sizes import Size, area_ratio, as_size, size_at, snap

DEFAULT_CANDIDATES = (96, 128, 160, 192, 224)  # px, for images of 224 px
STANDARD_ERRORS = 2.0  # a difference counts if it is at least this large


@dataclass(frozen=True)
class Trial:
    """One training that ends with a score. Equal trials have equal names, and names of different trials differ."""

    name: str  # of its folder
    rows: tuple[StageConfig, ...]  # the curriculum of the whole budget, so that the learning rate is one cosine over it
    num_rows: int  # rows that are trained; a branch ends before the others and is scored after a proxy
    equivalent_epochs: float  # budget of all rows
    seed: int
    start_from: str | None = None  # name of the trial whose checkpoint it starts from

    @property
    def is_branch(self) -> bool:
        return self.num_rows < len(self.rows)

    @property
    def bandwidths(self) -> tuple[int, ...]:
        """Px, of the rows that are trained."""
        return tuple(row.bandwidth for row in self.rows[: self.num_rows])


@dataclass(frozen=True)
class Space:
    """What a search chooses from."""

    image_size: Size  # px
    candidates: tuple[int, ...]  # px of the shorter side, rising
    num_stages: int
    equivalent_epochs: float  # of a curriculum; backward: of a run at full size
    seeds: tuple[int, ...]  # of each candidate
    noise_seeds: tuple[int, ...]  # of the curriculum that the noise is measured with; begins with `seeds`
    size_multiple: int = 1  # px; sides are multiples of it

    @property
    def full(self) -> int:
        """Bandwidth at full size, px."""
        return min(self.image_size)

    def branch(self, bandwidths: Sequence[int], seed: int) -> Trial:
        """Returns the training of the first stages at these bandwidths, each with an equal part of the compute.

        It starts from the checkpoint of the trial with all bandwidths but the last.
        """
        rest = self.num_stages - len(bandwidths)
        fraction = 1 / self.num_stages
        rows = tuple(
            StageConfig(compute_fraction=fraction, bandwidth=band) for band in (*bandwidths, *[self.full] * rest)
        )
        before = trial_name(bandwidths[:-1], seed) if len(bandwidths) > 1 else None
        return Trial(trial_name(bandwidths, seed), rows, len(bandwidths), self.equivalent_epochs, seed, before)

    def equal_epochs(self, bandwidths: Sequence[int], seed: int) -> Trial:
        """Returns a whole training in which each bandwidth gets an equal part of the epochs."""
        sizes = [size_at(band, self.image_size, self.size_multiple) for band in bandwidths]
        areas = [area_ratio(size, self.image_size) for size in sizes]
        rows = tuple(
            StageConfig(compute_fraction=area / sum(areas), bandwidth=band)
            for area, band in zip(areas, bandwidths, strict=True)
        )
        cost = self.equivalent_epochs * sum(areas) / len(areas)
        return Trial(trial_name(bandwidths, seed), rows, len(rows), cost, seed)


class Decision(BaseModel):
    """One choice of a search, with all that it was made from."""

    model_config = ConfigDict(frozen=True)

    stage: int  # from 1
    scores: dict[int, list[float]]  # candidate in px -> score of each seed
    limit: float  # mean scores from here on count as good
    chosen: int  # px
    why: str


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    rows: tuple[StageConfig, ...]
    equivalent_epochs: float
    noise: float  # standard deviation of the score over seeds
    margin: float  # differences below it do not count
    decisions: tuple[Decision, ...]
    trials: tuple[str, ...]  # names of the trials that trained the chosen curriculum
    why: str


# Yields trials that do not depend on each other, receives a score for each name (larger is better), returns the result.
Search = Generator[list[Trial], Mapping[str, float], Found]


def trial_name(bandwidths: Sequence[int], seed: int) -> str:
    return f"{'-'.join(map(str, bandwidths))}_seed{seed}"


def margin_of_noise(noise: float, num_scores: int, num_reference: int) -> float:
    """Returns how far the means of two sets of scores must differ to count: two standard errors of the difference.

    Args:
        noise: standard deviation of one score.
        num_scores, num_reference: scores in each mean.
    """
    return STANDARD_ERRORS * noise * math.sqrt(1 / num_scores + 1 / num_reference)


def choose_nearest(stage: int, scores: Mapping[int, Sequence[float]], margin: float, previous: int) -> Decision:
    """Returns the candidate with the best mean score, or among ties the one nearest to the previous bandwidth.

    A tie is a mean score within the margin of the best. The rule for ties is this project's: no change without evidence.

    Args:
        stage: from 1.
        scores: of each seed, by candidate.
        margin: of the noise.
        previous: bandwidth of the stage before, px; of two candidates equally near the smaller one is chosen.
    """
    means = {band: statistics.mean(values) for band, values in scores.items()}
    best = max(means, key=lambda band: (means[band], -band))
    limit = means[best] - margin
    tied = sorted(band for band, mean in means.items() if mean >= limit)
    chosen = min(tied, key=lambda band: (abs(band - previous), band))
    if len(tied) == 1:
        why = f"{best} is best by more than the margin {margin:.3g}"
    else:
        why = f"{', '.join(map(str, tied))} tie within the margin {margin:.3g}: the nearest to {previous} is chosen"
    return Decision(
        stage=stage, scores={band: list(values) for band, values in scores.items()}, limit=limit, chosen=chosen, why=why
    )


def find_candidates(asked: Sequence[int], image_size: int | Size, size_multiple: int) -> tuple[int, ...]:
    """Returns the candidates that are searched, rising.

    Args:
        asked: px; empty: 96, 128, 160, 192 and 224, scaled to the image size as the presets are.
        image_size: px, side or (H, W).
        size_multiple: px; the model takes multiples of it.
    Raises:
        ConfigError: with each candidate that the model cannot take.
    """
    image_size = as_size(image_size)
    full = min(image_size)
    if not asked:
        wanted = bandwidths_at(full, DEFAULT_CANDIDATES)
        return tuple(sorted({snap(band, full, size_multiple) for band in wanted.values()}))
    faults = [
        f"candidates: {band} exceeds {shorter_side(image_size)}"
        if band > full
        else f"candidates: {band} is not a multiple of {size_multiple}, as the model needs; the nearest is "
        f"{snap(band, full, size_multiple)}"
        for band in sorted(asked)
        if band > full or band % size_multiple
    ]
    if faults:
        raise ConfigError(faults, "search")
    return tuple(sorted(asked))
