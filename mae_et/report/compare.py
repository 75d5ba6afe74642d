"""Means over seeds, differences with 95% intervals, and the sentences that say whether a difference was seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom; beyond, 1.96 + 2.42 / df is within .002.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
       2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
MINUS = "−"
SAME = 0.005  # ratios this close to 1 are called the same


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation of n values; the deviation of one value is None."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Ratio:
    """One mean divided by another, with its standard error; None where a side has one value only."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Sample:
    """One result in percent."""

    value: float
    pair: str | None = None  # results with equal keys on two sides belong together: the seeds
    image_half: float | None = None  # half-width of the 95% interval that the validation images give


@dataclass(frozen=True)
class Comparison:
    """Mean minus the mean of the baseline, in points.

    `seed_half` is the half-width of the 95% interval over seeds, None with one run on a side. `image_half` is that over
    validation images, None for metrics that are not proportions of images.
    """

    value: float
    ns: tuple[int, int]
    seed_half: float | None
    image_half: float | None
    is_paired: bool

    @property
    def half(self) -> float | None:
        """Half-width of the 95% interval from both sources; None if neither is known."""
        known = [half for half in (self.seed_half, self.image_half) if half is not None]
        return math.hypot(*known) if known else None

    @property
    def is_seen(self) -> bool:
        """Whether the interval excludes 0. One run on a side shows no difference: the spread over seeds is unknown."""
        return self.seed_half is not None and self.half is not None and abs(self.value) > self.half


def summarize(values: Sequence[float | None]) -> Statistic | None:
    """Returns the statistic of the known values; None without any."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Statistic(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def ratio(over: Statistic, under: Statistic) -> Ratio | None:
    """Returns over / under; the relative error is sqrt(sd1^2 / n1 / mean1^2 + sd2^2 / n2 / mean2^2), to first order."""
    if under.mean == 0 or over.mean == 0:
        return None
    value, error = over.mean / under.mean, None
    if over.sd is not None and under.sd is not None:
        parts = [
            sd / math.sqrt(n) / mean for mean, sd, n in ((over.mean, over.sd, over.n), (under.mean, under.sd, under.n))
        ]
        error = abs(value) * math.hypot(*parts)
    return Ratio(value, error)


def quantile95(freedom: float) -> float:
    """Returns the two-sided 95% quantile of Student's t, interpolated in 1 / df between whole degrees of freedom."""
    low = max(1, math.floor(freedom))
    below, above = (T95[df - 1] if df <= len(T95) else 1.96 + 2.42 / df for df in (low, low + 1))
    share = (1 / low - 1 / max(freedom, 1)) / (1 / low - 1 / (low + 1))
    return below + share * (above - below)


def compare(ours: Sequence[Sample], baseline: Sequence[Sample]) -> Comparison | None:
    """Compares two groups of results.

    Seeds: where both sides have the same pairs, the t interval of the differences; else Welch's interval with
    Satterthwaite's degrees of freedom. Validation images: the half-widths of both sides in quadrature. All seeds share
    the images, so more seeds do not narrow that part; it treats the two sides as independent, which is cautious.

    Source: Student (1908); Welch (1947).
    """
    if not ours or not baseline:
        return None
    sides = [[sample.value for sample in side] for side in (ours, baseline)]
    value, ns = statistics.fmean(sides[0]) - statistics.fmean(sides[1]), (len(ours), len(baseline))
    pairs = [{sample.pair: sample.value for sample in side} for side in (ours, baseline)]
    is_paired = None not in pairs[0] and pairs[0].keys() == pairs[1].keys() and (len(pairs[0]), len(pairs[1])) == ns
    seed_half = None
    if is_paired and ns[0] > 1:
        deviation = statistics.stdev(pairs[0][key] - pairs[1][key] for key in pairs[0])
        seed_half = quantile95(ns[0] - 1) * deviation / math.sqrt(ns[0])
    elif min(ns) > 1:
        parts = [statistics.variance(side) / len(side) for side in sides]
        total = sum(parts)
        freedom = total**2 / sum(part**2 / (n - 1) for part, n in zip(parts, ns, strict=True)) if total else min(ns) - 1
        seed_half = quantile95(freedom) * math.sqrt(total)
    halves = [[sample.image_half for sample in side if sample.image_half is not None] for side in (ours, baseline)]
    known = all(len(own) == n for own, n in zip(halves, ns, strict=True))
    image_half = math.hypot(*(statistics.fmean(own) for own in halves)) if known else None
    return Comparison(value, ns, seed_half, image_half, is_paired and ns[0] > 1)


def points(value: float, digits: int = 2) -> str:
    """Returns a signed number: "+3.00"."""
    return f"{MINUS if value < 0 else '+'}{abs(value):.{digits}f}"


def interval(comparison: Comparison) -> str:
    """Returns "−0.2 to +6.2"; nothing without an interval."""
    half = comparison.half
    return "" if half is None else f"{points(comparison.value - half)} to {points(comparison.value + half)}"


@dataclass(frozen=True)
class Verdict:
    """Sentences on one comparison: `lead` says whether a difference was seen, `rest` gives the numbers."""

    lead: str
    rest: str

    def __str__(self) -> str:
        return self.lead + self.rest


def judge(comparison: Comparison, ours: str, baseline: str, metric: str, place: str, cost: str = "") -> Verdict:
    """Says whether a difference was seen and how large a one could have been missed.

    Args:
        ours, baseline: labels of the groups.
        metric, place: what was measured, on what.
        cost: the cost of `ours` against the baseline; see `cost_words`.
    """
    where, half, change = f"in {metric} on {place}", comparison.half, f"{points(comparison.value)} points"
    sizes = f"n = {comparison.ns[0]}" + (f" and {comparison.ns[1]}" if comparison.ns[0] != comparison.ns[1] else "")
    between = f" between {ours} and {baseline} {where}: {change}"
    side = f"{ours} is {abs(comparison.value):.2f} points {'above' if comparison.value > 0 else 'below'} {baseline} {where}"
    if half is None:
        lead = f"No difference can be seen with {sizes}"
        rest = f"{between}. The difference that could have been missed is unknown; run two seeds or more on each side."
    elif comparison.seed_half is None and abs(comparison.value) <= half:
        lead = f"No difference can be seen with {sizes}"
        rest = f"{between}. Only one above {half:.2f} points would show, from the validation images alone."
    elif comparison.seed_half is None:
        lead = f"One run on a side ({sizes}) does not show the spread over seeds"
        rest = f": {side}, more than the {half:.2f} points that the choice of validation images explains."
    else:
        how = f"95% interval {interval(comparison)}, {sizes}, {'paired by seed' if comparison.is_paired else 'not paired'}"
        lead = "A difference was seen" if comparison.is_seen else "No difference was seen"
        rest = (
            f": {side} ({how})."
            if comparison.is_seen
            else f"{between} ({how}). Only one above {half:.2f} points would have shown."
        )
    return Verdict(lead, f"{rest} Cost: {cost}." if cost else rest)


def cost_words(counted: Any, measured: Any, nominal: Any) -> list[str]:
    """Returns what a run cost against its baseline, from ratios of the baseline's cost to its own.

    A ratio above 1 is a saving: "2x fewer FLOPs". One below 1 is turned round: .96 is "1.04x the FLOPs". The nominal ratio
    is used only if neither of the others is known.
    """
    found = []
    nominal = None if counted or measured else nominal
    for value, saving, plain in ((counted, "fewer FLOPs", "the FLOPs"), (measured, "less time", "the time"),
                                 (nominal, "fewer equivalent epochs", "the equivalent epochs")):  # fmt: skip
        number, error = (value.value, value.error) if isinstance(value, Ratio) else (value, None)
        if not number:
            continue
        if abs(number - 1) < SAME:
            found.append(plain.replace("the ", "the same "))
            continue
        words = saving if number > 1 else plain
        if number < 1:
            number, error = 1 / number, None if error is None else error / number**2
        found.append(f"{number:.3g}{'' if error is None else f' ± {error:.2f}'}x {words}")
    return found
