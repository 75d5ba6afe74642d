"""The sections of a discovery study's page: each study in words computed from its curves, with its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from mae_et.config.filters import band_edges, num_bands_at
from mae_et.report.discovery import (
    NUM_STANDARD_ERRORS,
    Curve,
    StudyData,
    filter_words,
    nearest_pair,
    reaches,
    separation,
)
from mae_et.report.discovery_drawing import BASELINE_STYLE, Drawing, Line, Panel, color, shades
from mae_et.report.drawing import MARKERS
from mae_et.report.text import markdown, markdown_table

HALF, LEARNED = 0.5, 0.05  # a band is learned if it ends this far below the error of a network that knows nothing

Section = tuple[str, list[Drawing]]


def metric_words(study: StudyData) -> str:
    return "kNN top-1" if study.record.metric.startswith("knn") else "top-1"


def _percent(fraction: float | None, otherwise: str = "never") -> str:
    return otherwise if fraction is None else f"{100 * fraction:.3g}%"


def _accuracy(curve: Curve) -> str:
    value, error = curve.final
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def _missing(what: str) -> Section:
    return f"Not drawn: {what}.\n", []


# -------------------------------------------------------------------- filtered training and filtered validation


def _train_filtered(study: StudyData) -> Section:
    metric = study.record.metric
    baseline = study.curve("baseline", metric, "full images (baseline)")
    groups = sorted(study.groups("train_filtered", "filter"), key=lambda run: run.radius or 0)
    if baseline is None:
        return _missing("the baseline is not finished")
    ylabel, panels, tables, facts = f"{metric_words(study)}, %", [], [], []
    for title, filtered in (
        ("validation filtered like training (baseline: full images)", True),
        ("validation not filtered", False),
    ):
        curves = [
            (run, curve)
            for run in groups
            if (
                curve := study.curve(
                    run.group, f"{metric}/{run.filter}" if filtered else metric, f"trained on r = {run.radius:g}"
                )
            )
        ]
        lines, points = _against(baseline, [curve for _, curve in curves])
        panels.append(Panel(lines, title, ylabel, 100))
        facts += [
            [f"separation, {title}", curve.label, None if at is None else 100 * at]
            for (_, curve), at in zip(curves, points, strict=True)
        ]
        tables.append([(run.radius, curve, at) for (run, curve), at in zip(curves, points, strict=True)])
    rows = [
        [f"{radius:g}", _percent(at), _accuracy(curve), _percent(plain_at), _accuracy(plain)]
        for (radius, curve, at), (_, plain, plain_at) in zip(*tables, strict=True)
    ]
    header = [
        "r, px",
        "separates at",
        "final, filtered like training",
        "separates at, not filtered",
        "final, not filtered",
    ]
    text = (
        f"Each curve is a run of its own, trained on images that were low-pass filtered. The baseline is trained and measured on "
        f"full images: {_accuracy(baseline)} at the end. {_order(tables[0])}\n\n"
        + markdown_table(header, rows, [False] * 5)
    )
    return text, [Drawing("train_filtered", "Accuracy of runs on low-pass images against the baseline", panels, facts)]


def _order(points: Sequence[tuple[float | None, Curve, float | None]]) -> str:
    """Says whether larger radii separate later, by the points found."""
    if len(points) < 2:
        return ""
    at = [2.0 if point is None else point for _, _, point in points]
    found = ", ".join(
        f"r = {radius:g} {'never' if point is None else f'at {_percent(point)}'}" for radius, _, point in points
    )
    if at == sorted(at) and at[0] < at[-1]:
        return f"**A larger radius separates later, in these runs:** {markdown(found)}."
    if set(at) == {2.0}:
        return "**No curve separates from the baseline, in these runs.**"
    if len(set(at)) == 1:
        return f"**All radii separate at the same point, in these runs:** {markdown(found)}."
    return f"**The separation points are not in the order of the radii, in these runs:** {markdown(found)}."


def _against(baseline: Curve, others: Sequence[Curve]) -> tuple[list[Line], list[float | None]]:
    """Returns the lines of a panel, with the separation points in the legend and as marks."""
    points = [separation(baseline, curve) for curve in others]
    lines = [
        Line(curve, {"color": shade}, at, f": separates at {_percent(at)}" if at is not None else ": does not separate")
        for curve, shade, at in zip(others, shades(len(others)), points, strict=True)
    ]
    return [Line(baseline, BASELINE_STYLE), *lines], points


def _val_filtered(study: StudyData) -> Section:
    metric = study.record.metric
    baseline = study.curve("baseline", metric, "full images")
    curves = [
        curve
        for name in study.record.low_filters
        if (curve := study.curve("baseline", f"{metric}/{name}", filter_words(name)))
    ]
    if baseline is None or not curves:
        return _missing("the baseline is not finished")
    lines, points = _against(baseline, curves)
    radii = [float(name.rsplit("_", 1)[1]) for name in study.record.low_filters]
    rows = [[curve.label, _percent(at), _accuracy(curve)] for curve, at in zip(curves, points, strict=True)]
    text = (
        "One network, trained on unfiltered images. Its accuracy is measured on filtered validation images over the training. "
        "Before the separation point, the frequencies beyond r bring the network nothing that the measurement sees. "
        f"{_order(list(zip(radii, curves, points, strict=False)))}\n\n"
        + markdown_table(["validation images", "separates at", "final"], rows, [True, False, False])
    )
    facts = [
        ["separation", curve.label, None if at is None else 100 * at] for curve, at in zip(curves, points, strict=True)
    ]
    panel = Panel(lines, "trained on unfiltered images, validation images filtered", f"{metric_words(study)}, %", 100)
    return text, [Drawing("val_filtered", "Accuracy of one network on low-pass validation images", [panel], facts)]


def _low_high(study: StudyData) -> Section:
    metric = study.record.metric
    baseline = study.curve("baseline", metric, "full images")
    low, high = (
        [curve for name in names if (curve := study.curve("baseline", f"{metric}/{name}", filter_words(name)))]
        for names in (study.record.low_filters, study.record.high_filters)
    )
    pair = nearest_pair(low, high)
    if baseline is None or pair is None:
        return _missing("the baseline is not finished")
    shares = (0.5, 0.9)
    at = [[reaches(curve, share) for share in shares] for curve in pair]
    faster = [a for a, b in zip(*at, strict=True) if a is not None and b is not None and a < b]
    rises = [
        curve.mean[-1] - curve.mean[0] > NUM_STANDARD_ERRORS * np.hypot(curve.error[0], curve.error[-1])
        for curve in pair
    ]
    if not all(rises):
        said = f"No statement: a curve of the pair rises by less than {NUM_STANDARD_ERRORS:g} standard errors."
    elif len(faster) == len(shares):
        said = "The low-pass curve rises faster, in this run."
    else:
        said = "The low-pass curve does not rise faster at both shares, in this run."
    others = [
        Line(
            curve,
            {
                "color": "0.6",
                "linewidth": 1.0,
                "markersize": 0,
                "zorder": 1,
                "linestyle": "-" if curve in low else "--",
            },
        )
        for curve in (*low, *high)
        if curve not in pair
    ]
    styles = [{"color": color(0), "linewidth": 2.0}, {"color": color(1), "linewidth": 2.0}]
    lines = [Line(baseline, BASELINE_STYLE), *(Line(curve, style) for curve, style in zip(pair, styles, strict=True))]
    rows = [
        [curve.label, _accuracy(curve), *(_percent(value) for value in points)]
        for curve, points in zip(pair, at, strict=True)
    ]
    text = (
        "One network, trained on unfiltered images, measured on low-pass and on high-pass validation images. Of all measured "
        f"pairs, the figure compares the one whose final accuracies are nearest: {markdown(pair[0].label)} and "
        f"{markdown(pair[1].label)}. **{said}** A curve's rise is its way from the first "
        "measured value to the last.\n\n"
        + markdown_table(
            ["validation images", "final", "half of the rise at", "90% of the rise at"],
            rows,
            [True, False, False, False],
        )
    )
    panels = [
        Panel(
            [*lines, *others],
            "trained on unfiltered images, validation images filtered",
            f"{metric_words(study)}, %",
            100,
        )
    ]
    facts = [
        [f"{share:.0%} of the rise", curve.label, None if value is None else 100 * value]
        for curve, points in zip(pair, at, strict=True)
        for share, value in zip(shares, points, strict=True)
    ]
    return text, [Drawing("low_high", "Accuracy on low-pass against high-pass validation images", panels, facts)]


# -------------------------------------------------------------------- the first part only


def _prefix(study: StudyData) -> Section:
    metric = study.record.metric
    baseline = study.curve("baseline", metric, "baseline")
    if baseline is None:
        return _missing("the baseline is not finished")
    full = study.runs("baseline")[0]
    lines: dict[str, list[tuple[float, float, float, float]]] = {}  # label -> part, equivalent epochs, final, its error
    rows = [["baseline", "", f"{full.equivalent_epochs:.4g}", _accuracy(baseline), ""]]
    for run in study.groups("prefix"):
        curve = study.curve(run.group, metric, run.group)
        if curve is None or run.variant == "baseline":
            continue
        label = {
            "filter": filter_words(run.filter) if run.filter else "", "crop": f"crop to {run.bandwidth} px",
            "weak_augmentation": "weak augmentation",
        }[run.variant]  # fmt: skip
        lines.setdefault(label, []).append((run.until, run.equivalent_epochs, *curve.final))
        difference, error = (
            100 * (curve.final[0] - baseline.final[0]),
            100 * np.hypot(curve.final[1], baseline.final[1]),
        )
        rows.append(
            [
                label,
                f"{run.until:.0%}",
                f"{run.equivalent_epochs:.4g}",
                _accuracy(curve),
                f"{difference:+.1f} ± {error:.1f}",
            ]
        )
    if not lines:
        return _missing("no run but the baseline is finished")
    start = (0.0, full.equivalent_epochs, *baseline.final)
    by_part, by_cost = (
        [
            Line(
                _points(label, [start, *sorted(points)], axis),
                {"color": color(i), "marker": MARKERS[i % len(MARKERS)], "markersize": 6},
            )
            for i, (label, points) in enumerate(lines.items())
        ]
        for axis in (0, 1)
    )
    text = (
        "Each run differs from the baseline in its first part only; the rest is the baseline's. All runs show the same number of "
        "images. A filter and weak augmentation cost the same as the baseline; a crop costs less. Accuracies are measured on "
        "full images at the end; ± is one standard error.\n\n"
        + markdown_table(
            ["in the first part", "part", "equivalent epochs", "final", "against the baseline"],
            rows,
            [True] + [False] * 4,
        )
    )
    ylabel, level = f"final {metric_words(study)}, %", 100 * baseline.final[0]
    panels = [
        Panel(
            by_part,
            "against the length of the first part",
            ylabel,
            100,
            "first part, % of the images shown",
            level=level,
        ),
        Panel(by_cost, "against the cost", ylabel, 100, "equivalent epochs", x_scale=1.0, level=level, error_bars=True),
    ]
    return text, [Drawing("prefix", "Final accuracy against the length of the changed first part and the cost", panels)]


def _points(label: str, points: Sequence[tuple[float, float, float, float]], axis: int) -> Curve:
    columns = np.array(sorted(points, key=lambda point: point[axis])).T
    return Curve(label, columns[axis], columns[2], columns[3])


# -------------------------------------------------------------------- frequency bands


def _bands(study: StudyData) -> Section:
    edges = band_edges(num_bands_at(study.record.image_size))
    found = [
        study.curve("baseline", f"val/band_error_{k}", f"{low:g} to {high:g} px")
        for k, (low, high) in enumerate(pairwise(edges))
    ]
    curves = [curve for curve in found if curve is not None]
    if not curves:
        return _missing("the baseline is not finished, or its objective has no pixels")
    half = [reaches(curve, HALF, start=1.0) if curve.mean[-1] < 1 - LEARNED else None for curve in curves]
    rows = [
        [curve.label, f"{curve.mean[0]:.2f}", f"{curve.mean[-1]:.3f}", _percent(at, "not learned")]
        for curve, at in zip(curves, half, strict=True)
    ]
    learned = [at for at in half if at is not None]
    is_first = [at is not None for at in half] == sorted((at is not None for at in half), reverse=True)
    if len(learned) > 1 and is_first and learned == sorted(learned):
        said = "**Lower bands come first, in this run**: no band is half learned before a lower one."
    elif len(learned) > 1:
        early = sum(a < b for i, a in enumerate(learned) for b in learned[i + 1 :])
        said = (
            f"**The order of the bands is mixed, in this run**: in {early} of {len(learned) * (len(learned) - 1) // 2} pairs of "
            "learned bands the lower one is half learned first."
        )
    elif len(learned) == 1 and half[0] is not None:
        said = "**Only the lowest band is learned, in this run.**"
    else:
        said = "Fewer than two bands are learned, so there is no order."
    known = (
        "The means of the patches are known, because predictions of normalized patches are drawn with the mean and contrast of "
        "the originals; so 1 is a network that predicts flat patches."
        if study.record.norm_pix_loss
        else "So 1 is a network that predicts the mean colour of the data set."
    )
    text = (
        "The error of the predicted pixels in a band of the spectrum, over the power that there was to predict, on fixed "
        "validation images under fixed masks at full size. Each patch comes from a pass that removed it, so no mask edge is in "
        f"the spectrum. {known} A band is half learned when its error has made half of its way from 1 to its last value; it "
        f"counts as learned if it ends below {1 - LEARNED:g}. {said}\n\n"
        + markdown_table(
            ["band", "error, untrained", "error at the end", "half learned at"], rows, [True, False, False, False]
        )
    )
    ways = [
        Line(Curve(c.label, c.compute, (1 - c.mean) / (1 - c.mean[-1]), np.full(len(c.mean), np.nan)), {"color": shade})
        for c, at, shade in zip(curves, half, shades(len(curves)), strict=True)
        if at is not None
    ]
    errors = [Line(curve, {"color": shade}) for curve, shade in zip(curves, shades(len(curves)), strict=True)]
    panels = [Panel(errors, "error by band, relative to what is to predict", "relative error", level=1.0, top=1.5)]
    if ways:
        panels.append(Panel(ways, "share of what is learned in the end", "share", log_x=True, level=HALF, bottom=-0.1))
    facts = [
        ["half learned at, % of the compute", c.label, None if at is None else 100 * at]
        for c, at in zip(curves, half, strict=True)
    ]
    return text, [Drawing("bands", "Reconstruction error by frequency band over the training", panels, facts)]


SECTIONS: dict[str, Callable[[StudyData], Section]] = {
    "train_filtered": _train_filtered,
    "val_filtered": _val_filtered,
    "low_high": _low_high,
    "prefix": _prefix,
    "bands": _bands,
}
