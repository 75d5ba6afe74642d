"""The published curricula as tables, and how they follow the image size and the patch size. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from mae_et.config.training import CurriculumConfig, StageConfig
from mae_et.models.sizes import Size, as_size, size_at, size_text, snap

REFERENCE_SIZE = 224  # px; the presets are written for it
SMALLEST_PUBLISHED_SIZE = 160  # px; below it, the published low sizes of 96 and 160 px leave no curriculum


def _rows(*rows: tuple[float, int, float | None]) -> tuple[StageConfig, ...]:
    return tuple(StageConfig(compute_fraction=f, bandwidth=b, strength=s) for f, b, s in rows)


def _tenths(*bandwidths: int) -> tuple[StageConfig, ...]:
    """Ten equal tenths of the compute, RandAugment magnitude 0 to 9 (strength 0 to 1), one step per tenth."""
    return _rows(*((0.1, band, i / 9) for i, band in enumerate(bandwidths)))


def _equal_epochs(
    *bandwidths_and_strengths: tuple[int, float | None], size_of: Callable[[int], Size] = as_size
) -> tuple[StageConfig, ...]:
    """Equal parts of the epochs. An image's compute goes with its area; `size_of` maps a bandwidth to its size."""
    areas = [math.prod(size_of(band)) for band, _ in bandwidths_and_strengths]
    rows = zip(areas, bandwidths_and_strengths, strict=True)
    return _rows(*((area / sum(areas), band, strength) for area, (band, strength) in rows))


# Sources: EfficientTrain++ (arXiv 2405.08768) and its authors' released code for etpp*; EfficientTrain (arXiv 2211.09703)
# for et; "blog" is the version of a summary, which disagrees with the released code.
PRESETS: Mapping[str, tuple[StageConfig, ...]] = MappingProxyType(
    {
        "etpp": _tenths(96, 96, 160, 160, 160, 160, 224, 224, 224, 224),
        "etpp_deit": _tenths(96, 96, 160, 160, 160, 160, 192, 192, 224, 224),
        "etpp_convnext": _tenths(160, 160, 160, 160, 160, 160, 224, 224, 224, 224),
        "et": _equal_epochs((160, 1 / 9), (160, 3 / 9), (160, 5 / 9), (192, 7 / 9), (224, 1.0)),
        "blog": _rows((0.4, 96, None), (0.3, 128, None), (0.3, 224, None)),
        "constant": _rows((1.0, 224, 1.0)),
    }
)


def curriculum_rows(
    config: CurriculumConfig, image_size: int | Size, size_multiple: int
) -> tuple[tuple[StageConfig, ...], list[str]]:
    """Returns the rows of a curriculum for an image size.

    Args:
        config: names a preset, or has its own stages.
        image_size: px, side or (H, W), of the last row. The bandwidths follow the shorter side.
        size_multiple: px; bandwidths are rounded to multiples of it.
    Returns:
        The rows, and notes on the bandwidths that differ from the preset's.
    """
    if config.preset == "custom":
        return config.stages, []
    rows = PRESETS[config.preset]
    bands, notes = {}, []
    full = as_size(image_size)
    image_size, shown = min(full), size_text(full)
    for original, wanted in bandwidths_at(image_size, [row.bandwidth for row in rows]).items():
        snapped = snap(wanted, image_size, size_multiple)
        bands[original] = snapped
        if (snapped != original or full[0] != full[1]) and original != REFERENCE_SIZE:
            at_size = f" at image size {shown}" if shown != str(REFERENCE_SIZE) else ""
            rounded = (
                f" ({wanted:.4g} snapped to a multiple of the patch size {size_multiple})" if snapped != wanted else ""
            )
            becomes = size_text(size_at(snapped, full, size_multiple))
            notes.append(f"bandwidth {original} of preset {config.preset!r} becomes {becomes}{at_size}{rounded}")
    if config.preset != "constant" and image_size < SMALLEST_PUBLISHED_SIZE:
        notes.append(
            f"image size {shown} is below {SMALLEST_PUBLISHED_SIZE}, where the published sizes begin: all bandwidths of "
            f"preset {config.preset!r} are scaled with it, which is this project's rule"
        )
    if config.preset != "constant" and set(bands.values()) == {image_size}:
        notes.append(
            f"preset {config.preset!r} has no smaller bandwidth at image size {shown}: the run saves no compute"
        )
    if config.preset == "et":  # equal epochs at any size, so the compute fractions follow the areas
        named = [(bands[row.bandwidth], row.strength) for row in rows]
        return _equal_epochs(*named, size_of=lambda band: size_at(band, full, size_multiple)), notes
    return tuple(row.model_copy(update={"bandwidth": bands[row.bandwidth]}) for row in rows), notes


def bandwidths_at(image_size: int, bandwidths: Sequence[int]) -> dict[int, float]:
    """Returns what the bandwidths of a preset become at another image size, before they are rounded.

    From 160 px on, the smallest stays as it is, each one above it lies half way between the one before and the image size,
    and the last is the image size. Published for three sizes (96 or 160, half way, g); applied to lists of other lengths,
    such as etpp_deit's, the rule is ours. Below 160 px all bandwidths keep their ratio to the image size (ours).

    Args:
        image_size: g, px; of a rectangle the shorter side.
        bandwidths: px, rising, the last one at REFERENCE_SIZE.
    Source: EfficientTrain (arXiv 2211.09703), larger final sizes.
    """
    distinct = sorted(set(bandwidths))
    if image_size < SMALLEST_PUBLISHED_SIZE or image_size == REFERENCE_SIZE:
        return {band: band * image_size / REFERENCE_SIZE for band in distinct}
    result: dict[int, float] = {REFERENCE_SIZE: image_size}
    band: float = distinct[0]
    for original in distinct[:-1]:
        result[original] = min(band, image_size)
        band = (band + image_size) / 2
    return dict(sorted(result.items()))


def strength_starts(rows: Sequence[StageConfig]) -> tuple[tuple[float, float], ...]:
    """Returns (compute fraction, strength from there on); empty where the rows leave the strength linear."""
    if any(row.strength is None for row in rows):
        return ()
    starts = [math.fsum(row.compute_fraction for row in rows[:i]) for i in range(len(rows))]
    return tuple((start, row.strength) for start, row in zip(starts, rows, strict=True) if row.strength is not None)
