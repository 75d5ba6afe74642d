"""Frequency filters of a run's images, for the discovery study. They do not change the size of the images.

A radius is in px of the spectrum of a 224 px image, at any image size: 112 is the Nyquist limit of an axis. At image
size S it is radius S / 224 cycles per image; S is the shorter side of a rectangle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from mae_et.config.data import AsTuple, DataConfig, PositiveFloat, UnitInterval
from mae_et.config.section import Section, check, unused
from mae_et.models.sizes import Size, as_size, size_text

SPECTRUM_SIZE = 224  # px, of the images in whose spectrum radii are given
NUM_BANDS = 8  # of the reconstruction error by frequency band; images of less than 16 px have fewer


def num_bands_at(image_size: int | Size) -> int:
    """Returns the number of bands: NUM_BANDS, or fewer for images of less than 16 px."""
    return min(NUM_BANDS, min(as_size(image_size)) // 2)


def band_edges(num_bands: int) -> list[float]:
    """Returns the edges of the bands, px of the spectrum of a 224 px image; the last band also holds the corners beyond."""
    return [SPECTRUM_SIZE / 2 * k / num_bands for k in range(num_bands + 1)]


class FilterConfig(Section):
    """One filter of validation images."""

    kind: Literal["low_pass", "high_pass"] = Field(description="Keeps or removes the frequencies up to the radius.")
    radius: PositiveFloat = Field(description="Px of the spectrum of a 224 px image: 112 is the Nyquist limit.")
    shape: Literal["circle", "square"] = Field(
        "circle", description="Region of the radius: a circle, or a square of side 2 radius."
    )

    @property
    def name(self) -> str:
        """Names the filter in metrics, e.g. "low_pass_circle_20"."""
        return f"{self.kind}_{self.shape}_{self.radius:g}"

    def radius_at(self, image_size: Size) -> float:
        """Returns the radius in cycles per shorter side of the image."""
        return self.radius * min(image_size) / SPECTRUM_SIZE

    @check
    def _radius(self) -> Iterator[str]:
        farthest = SPECTRUM_SIZE / 2 * (math.sqrt(2) if self.shape == "circle" else 1)
        if self.radius >= farthest:
            yield (
                f"radius = {self.radius:g} holds the whole spectrum, which ends at {farthest:.4g} for shape = "
                f"{self.shape!r}: lower it"
            )


class TrainFilterConfig(FilterConfig):
    """The filter of the training images."""

    kind: Literal["none", "low_pass", "high_pass"] = Field(  # type: ignore[assignment]
        "none", description="Keeps or removes the frequencies up to the radius. none: no filter."
    )
    radius: PositiveFloat = Field(40.0, description=FilterConfig.model_fields["radius"].description)
    until: UnitInterval = Field(1.0, description="Filters up to this fraction of the compute, then shows full images.")

    @check
    def _unused(self) -> Iterator[str]:
        if self.kind == "none":
            yield from unused(self, ["radius", "shape", "until"], "kind = 'none'")


class FilteredDataConfig(DataConfig):
    """Adds filters of the training and the validation images: see docs/guides/discover.md."""

    filter: TrainFilterConfig = TrainFilterConfig()
    val_filters: Annotated[tuple[FilterConfig, ...], AsTuple] = Field(
        (), description="Filters under which the accuracy is measured too. It is always measured on full images."
    )

    @check
    def _filter_radii(self) -> Iterator[str]:
        rows = {f"val_filters[{i}]": row for i, row in enumerate(self.val_filters)}
        for where, row in {"filter": self.filter, **rows}.items():
            if row.kind != "none" and row.radius_at(self.image_size) < 1:
                yield (
                    f"{where}.radius = {row.radius:g} is {row.radius_at(self.image_size):.2g} cycles per image at image_size "
                    f"= {size_text(self.image_size)}, so the region holds the mean only: raise it to "
                    f"{SPECTRUM_SIZE / min(self.image_size):.4g}"
                )

    @check
    def _different_val_filters(self) -> Iterator[str]:
        names = [row.name for row in self.val_filters]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"val_filters has {name} more than once: remove the copies"

    @check
    def _val_filters_need_val(self) -> Iterator[str]:
        if self.val_filters and self.val is None:
            yield "val_filters has no effect without val: remove it, or give labelled validation images"
