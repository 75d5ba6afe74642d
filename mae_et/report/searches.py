"""Curriculum searches in the report: a table of the trials and a picture of the decisions for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from mae_et.report.drawing import FAINT, INK, draw
from mae_et.runs.record_files import read_record
from mae_et.runs.search import SEARCH, SearchRecord, TrialRecord, read_trials
from mae_et.runs.search_picture import axis_labels, paint

HEADER = ["trial", "bandwidths", "seed", "score", "equivalent epochs", "real epochs", "state"]
CHOSEN = "#fe0000"  # the page's first colour; see `drawing.draw`


@dataclass
class Search:
    """A search that was found below the folders of a report."""

    path: Path
    name: str
    record: SearchRecord | None = None
    trials: list[TrialRecord] = field(default_factory=list)
    problem: str = ""  # why it cannot be read

    @property
    def lead(self) -> str:
        """What was searched and found, in a sentence."""
        if self.record is None:
            return f"cannot be read: {self.problem}"
        settings, found = self.record.settings, self.record.found
        begin = f"{settings.algorithm} search by {settings.score}"
        if found is None:
            return f"{begin}, not finished: {len(self.trials)} trials are done"
        stages = " | ".join(f"{row.bandwidth} px {row.compute_fraction:.0%}" for row in found.stages)
        return (
            f"{begin}: {stages}; score {found.score or 0.0:.4g}, noise {found.noise:.2g}, differences below "
            f"{found.margin:.2g} do not count; {found.spent_equivalent_epochs:.1f} equivalent epochs in "
            f"{found.num_trials} trials"
        )

    @property
    def rows(self) -> list[list[str]]:
        """The trials, as text below `HEADER`."""
        chosen = self.record.found.trials if self.record is not None and self.record.found is not None else []
        return [
            [
                trial.name,
                " ".join(map(str, trial.bandwidths)),
                str(trial.seed),
                f"{trial.score:.5g}",
                f"{trial.equivalent_epochs:.2f}",
                f"{trial.real_epochs:.2f}",
                "found" if trial.name in chosen else trial.status,
            ]
            for trial in self.trials
        ]

    @cached_property
    def picture(self) -> str:
        """The tree as an SVG in the page's colours; empty until the search is done."""
        if self.record is None or self.record.found is None:
            return ""
        draws = partial(paint, record=self.record, trials=self.trials, ink=INK, chosen=CHOSEN, other=FAINT)
        return draw(self.name.replace(" ", "-"), draws, *axis_labels(self.record))


def find_searches(roots: Sequence[Path]) -> list[Search]:
    """Returns the searches at or below folders, ordered by path."""
    folders = {
        Path(here).resolve(): Path(here) for root in roots for here, _, files in os.walk(root) if SEARCH in files
    }
    return [_read(folder, f"search {i}") for i, folder in enumerate(sorted(folders.values()), 1)]


def _read(folder: Path, name: str) -> Search:
    try:
        return Search(folder, name, read_record(folder / SEARCH, SearchRecord), read_trials(folder))
    except (OSError, ValueError) as error:
        return Search(folder, name, problem=str(error))
