"""The settings of a curriculum search; `mae-et search` has an option for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from mae_et.config.data import AsTuple, Positive, PositiveFloat
from mae_et.config.section import Section, check, unused

AtLeastTwo = Annotated[int, Field(ge=2)]


class SearchConfig(Section):
    """How a curriculum is searched. Where the papers are silent, the values are settings of this project."""

    algorithm: Literal["sequential", "backward", "bayesian"] = Field(
        "sequential",
        description="sequential: Algorithm 2 of EfficientTrain++; backward: Algorithm 1 of EfficientTrain; bayesian: Optuna.",
    )
    candidates: Annotated[tuple[Positive, ...], AsTuple] = Field(
        (), description="Bandwidths to choose from, px. Empty: 96 to 224 in steps of 32, scaled as the presets are."
    )
    stages: AtLeastTwo = Field(5, description="Number of stages; the last one is at full image size.")
    budget: PositiveFloat = Field(
        2 / 3,
        description="Compute of the curriculum over that of the baseline (curriculum.baseline_equivalent_epochs); sequential "
        "and bayesian.",
    )
    proxy_epochs: PositiveFloat | None = Field(
        None,
        description="Length of the fine-tuning at full size before a branch is scored, in equivalent epochs; sequential. "
        "None: a 60th of the baseline (5 of 300), at least 10 steps. The papers give no length.",
    )
    score: Literal["top1", "knn", "linear", "loss", "rankme"] | None = Field(
        None,
        description="What is compared. top1: supervised accuracy; knn, linear: accuracy on the features of a MAE; loss: held-out "
        "loss, negated; rankme: effective rank of the features. None: top1 or knn.",
    )
    repeats: Positive = Field(1, description="Seeds that each candidate is trained with; their mean score counts.")
    noise_seeds: AtLeastTwo = Field(
        3, description="Seeds of one curriculum that are scored first to measure the noise of the score."
    )
    tolerance: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="How far a score may fall below the baseline's; backward. None: the margin of the noise.",
    )
    trials: Positive = Field(20, description="Number of curricula that are tried; bayesian.")
    sampler: Literal["tpe", "gp"] = Field("tpe", description="Optuna's sampler: TPE or Gaussian process; bayesian.")

    @check
    def _candidates(self) -> Iterator[str]:
        repeated = sorted({band for band in self.candidates if self.candidates.count(band) > 1})
        if repeated:
            yield f"candidates name {', '.join(map(str, repeated))} more than once: name each bandwidth once"
        if len(self.candidates) == 1:
            yield f"candidates = {self.candidates[0]} leaves no choice: give at least two bandwidths"

    @check
    def _unused(self) -> Iterator[str]:
        others = {
            "sequential": ["tolerance", "trials", "sampler"],
            "backward": ["budget", "proxy_epochs", "trials", "sampler"],
            "bayesian": ["proxy_epochs", "tolerance"],
        }
        yield from unused(self, others[self.algorithm], f"algorithm = {self.algorithm!r}")
