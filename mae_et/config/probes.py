"""The sections of a classification config that choose labels, neighbours and hyper-parameters of a probe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from mae_et.config.data import AsTuple, Positive, PositiveFloat
from mae_et.config.section import Section, check, unused

OpenFraction = Annotated[float, Field(gt=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]


class LabelsConfig(Section):
    """Which labels of data.train are used: all of them, or a random part of each class."""

    images_per_class: Positive | None = Field(
        None, description="Few-shot: this many images of each class, drawn with run.seed."
    )
    fraction: OpenFraction | None = Field(
        None, description="This fraction of the images of each class, drawn with run.seed."
    )
    num_draws: Positive = Field(
        5,
        description='Subsets that are drawn and judged with protocol = "knn" or "linear_sweep"; the accuracy is their mean, with '
        "its deviation. The other protocols train on one subset: repeat them with another run.seed.",
    )

    @property
    def are_all(self) -> bool:
        return self.images_per_class is None and self.fraction is None

    @check
    def _one_rule(self) -> Iterator[str]:
        if self.images_per_class is not None and self.fraction is not None:
            yield (
                f"images_per_class = {self.images_per_class} and fraction = {self.fraction:g} both set the number of labels: "
                "remove one"
            )

    @check
    def _unused(self) -> Iterator[str]:
        if self.are_all:
            yield from unused(self, ["num_draws"], "all labels")


class KnnConfig(Section):
    """The kNN protocol."""

    ks: Annotated[tuple[Positive, ...], AsTuple] = Field((10, 20, 100, 200), description="Numbers of neighbours.")
    temperature: PositiveFloat = Field(0.07, description="Temperature of the neighbours' weights.")

    @check
    def _some_k(self) -> Iterator[str]:
        if not self.ks:
            yield "ks = [] must have at least one number of neighbours"


class SweepConfig(Section):
    """Linear heads on cached features, one for each pair of learning rate and weight decay.

    They are trained side by side with SGD (momentum 0.9, cosine, batch 256), and the best pair on a part of the training
    images is trained again on all of them.
    """

    lrs: Annotated[tuple[PositiveFloat, ...], AsTuple] = Field(
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), description="Absolute learning rates."
    )
    weight_decays: Annotated[tuple[NonNegative, ...], AsTuple] = Field(
        (0.0, 1e-4, 1e-3), description="Weight decays; not of the bias."
    )
    epochs: Positive = Field(50, description="Passes over the features.")
    selection_fraction: OpenFraction = Field(
        0.2,
        description="Fraction of the training images (of each class) that the pair is chosen on. Validation images take no part.",
    )

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """The pairs of learning rate and weight decay."""
        return [(lr, decay) for decay in self.weight_decays for lr in self.lrs]

    @check
    def _some_pair(self) -> Iterator[str]:
        for name in ("lrs", "weight_decays"):
            if not getattr(self, name):
                yield f"{name} = [] must have at least one value"

    @check
    def _unused(self) -> Iterator[str]:
        if len(self.lrs) == len(self.weight_decays) == 1:
            yield from unused(self, ["selection_fraction"], "one pair of learning rate and weight decay")
