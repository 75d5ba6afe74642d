"""Draws the reconstruction error by frequency band of the pre-trainings: a figure for each, a line for each band."""

from __future__ import annotations

from collections.abc import Iterator

from mae_et.config.filters import NUM_BANDS, band_edges
from mae_et.report.drawing import Series
from mae_et.report.figures import Figure, Line, curve, draw_lines, thin
from mae_et.report.join import UNTRAINED, Benchmark
from mae_et.report.scan import Run

BAND_KEYS = tuple(f"val/band_error_{k}" for k in range(NUM_BANDS))
NOTE = (
    "Error of the predicted pixels over the power that there was to predict, by band of the spectrum, on held-out images at full "
    "size under fixed masks. 1 is a network that knows nothing but the mean colour or, with normalized patches, the mean of each "
    "patch. Bands in px of the spectrum of a 224 px image; the last one also holds the corners."
)


def band_figures(benchmark: Benchmark) -> Iterator[Figure]:
    """Yields a figure for each pre-training in the tables, of the first of its seeds, and for each running one."""
    shown = [next(iter(own.runs), None) for own in benchmark.origins if own.label != UNTRAINED]
    runs = [run for run in shown if run is not None and run in benchmark.shown]
    runs += [run for run in benchmark.running if run.kind == "pretrain"]
    for i, run in enumerate(run for run in runs if run.metrics[BAND_KEYS[0]].notna().any()):
        yield _figure(i, run)


def _figure(i: int, run: Run) -> Figure:
    keys = [key for key in BAND_KEYS if run.metrics[key].notna().any()]
    bands = [BAND_KEYS.index(key) for key in keys]
    edges = band_edges(bands[-1] + 1)
    legend = [Series(k, f"{edges[k]:g} to {edges[k + 1]:g} px") for k in bands]
    points = [thin(curve(run, key)) for key in keys]
    variants = []
    for axis, label in ((0, "equivalent epochs"), (1, "wall time, s")):
        lines: list[Line] = [
            (one, own[:, axis].tolist(), own[:, 2].tolist()) for one, own in zip(legend, points, strict=True)
        ]
        variants.append((label, draw_lines(f"bands{i}-{axis}", lines, label, "relative error", marker=True)))
    return Figure(
        f"bands_{i + 1}",
        f"Reconstruction error by frequency band: {run.name}",
        variants,
        legend,
        ["band", "equivalent epochs", "seconds", "relative error"],
        [[one.label, *point] for one, own in zip(legend, points, strict=True) for point in own.tolist()],
        NOTE,
    )
