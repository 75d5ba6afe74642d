"""Reads the runs of a discovery study and finds where curves separate. The figures and the page are in discovery_page.py.

An accuracy is a mean over the seeds. Its standard error has two parts in quadrature: the choice of the validation images,
sqrt(p (1 - p) / num_val), and the spread over the seeds, if there are several.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mae_et.errors import UserError
from mae_et.runs.record_files import read_json
from mae_et.runs.study import RUNS_FOLDER, STUDY_FILE, StudyRecord, StudyRun
from mae_et.storage.metrics_file import read_jsonl

NUM_STANDARD_ERRORS = 2.0
RULE = (
    "Separation point (a rule of this project): the first measured point of the compute from which on the baseline is more "
    f"than {NUM_STANDARD_ERRORS:g} standard errors of the difference above the other curve, at all later points. The standard "
    "error covers the choice of the validation images, as if both curves had independent ones, and the spread over the seeds."
)


@dataclass(frozen=True, eq=False)
class Curve:
    """A quantity over the training: [n] each."""

    label: str
    compute: np.ndarray  # fraction done, 0 to 1
    mean: np.ndarray
    error: np.ndarray  # standard error; NaN where unknown
    num_seeds: int = 1

    @property
    def final(self) -> tuple[float, float]:
        """Value and standard error at the end."""
        return float(self.mean[-1]), float(self.error[-1])


@dataclass
class StudyData:
    """A study with the metrics of its runs."""

    record: StudyRecord
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by name of the run; unfinished ones too

    def runs(self, group: str) -> list[StudyRun]:
        return [run for run in self.record.runs if run.group == group]

    def groups(self, study: str, variant: str | None = None) -> list[StudyRun]:
        """Returns the first run of each group that a study uses, in the order of the study."""
        found: dict[str, StudyRun] = {}
        for run in self.record.runs:
            if study in run.studies and variant in (None, run.variant):
                found.setdefault(run.group, run)
        return list(found.values())

    def curve(self, group: str, key: str, label: str) -> Curve | None:
        """Returns the mean over the finished seeds; None if no seed is finished or none has logged the quantity."""
        points = []
        for run in self.runs(group):
            own = {line["step"]: line[key] for line in self.metrics.get(run.name, []) if line.get(key) is not None}
            if run.num_steps in own:  # a run that is not at its end has no part in a mean
                points.append(own)
        steps = sorted(set.intersection(*map(set, points))) if points else []
        if not steps:
            return None
        values = np.array([[own[step] for step in steps] for own in points], dtype=float)
        mean, num_val = values.mean(axis=0), self.record.num_val
        variance = np.full(len(steps), np.nan)
        if key.startswith(self.record.metric) and num_val:
            variance = mean * (1 - mean) / num_val
            if len(values) > 1:
                variance = variance + values.var(axis=0, ddof=1) / len(values)
        total = next(run.num_steps for run in self.runs(group))
        return Curve(label, np.array(steps) / total, mean, np.sqrt(variance), len(values))

    @property
    def unfinished(self) -> list[str]:
        """Names of the runs that have no accuracy or error at their last step."""
        return [
            run.name
            for run in self.record.runs
            if not any(line["step"] == run.num_steps and _is_measured(line) for line in self.metrics.get(run.name, []))
        ]


def _is_measured(line: dict[str, Any]) -> bool:
    return any("top1" in key or "band_error" in key for key in line)


def read_study(work_dir: Path) -> StudyData:
    """Reads study.json and the metrics of its runs.

    Raises:
        UserError: if the folder holds no study.
    """
    path = work_dir / STUDY_FILE
    try:
        record = StudyRecord.model_validate_json(json.dumps(read_json(path)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable study ({error}): run `mae-et discover` without --figures-only first"
        ) from error
    return StudyData(
        record, {run.name: read_jsonl(work_dir / RUNS_FOLDER / run.name / "metrics.jsonl") for run in record.runs}
    )


def separation(baseline: Curve, other: Curve) -> float | None:
    """Returns the fraction of the compute at which a curve falls below the baseline for good; None: it does not.

    The rule is `RULE`. Only points that both curves have are used.
    """
    compute, gap, error = _gap(baseline, other)
    below = gap > NUM_STANDARD_ERRORS * error
    if not len(below) or not below[-1]:
        return None
    last_other = np.flatnonzero(~below)
    first = 0 if not len(last_other) else int(last_other[-1]) + 1
    return float(compute[first])


def _gap(baseline: Curve, other: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the common compute fractions, baseline - other there, and its standard error."""
    compute, i, j = np.intersect1d(baseline.compute.round(9), other.compute.round(9), return_indices=True)
    return compute, baseline.mean[i] - other.mean[j], np.hypot(baseline.error[i], other.error[j])


def nearest_pair(low: Sequence[Curve], high: Sequence[Curve]) -> tuple[Curve, Curve] | None:
    """Returns the low-pass and the high-pass curve whose final values are nearest to each other."""
    pairs = [(abs(a.final[0] - b.final[0]), i, j) for i, a in enumerate(low) for j, b in enumerate(high)]
    if not pairs:
        return None
    _, i, j = min(pairs)
    return low[i], high[j]


def reaches(curve: Curve, share: float, start: float | None = None) -> float | None:
    """Returns the compute fraction at which a curve has made a share of its way to its last value.

    Linear between the measured points; the first time counts.

    Args:
        curve: the curve.
        share: of the way, above 0 and at most 1.
        start: value where the way begins; None: the first value.
    Returns:
        The fraction, or None for a curve that ends where its way begins.
    """
    begin = float(curve.mean[0]) if start is None else start
    way = curve.mean[-1] - begin
    if way == 0 or len(curve.mean) < 2:
        return None
    done = (curve.mean - begin) / way
    after = int(np.argmax(done >= share))
    if after == 0:
        return float(curve.compute[0])
    x0, x1, y0, y1 = curve.compute[after - 1], curve.compute[after], done[after - 1], done[after]
    return float(x0 + (x1 - x0) * (share - y0) / (y1 - y0))


def filter_words(name: str) -> str:
    """Returns the name of a filter in words: "low_pass_circle_20" -> "low-pass, r = 20"."""
    kind, _, shape, radius = name.split("_")
    return f"{kind}-pass, r = {radius}" + (" (square)" if shape == "square" else "")
