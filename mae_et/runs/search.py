"""The files of a curriculum search: the record of each trial, the record and table of the search, the curriculum found."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from mae_et.config.search import SearchConfig
from mae_et.config.training import StageConfig
from mae_et.curriculum.search.trial import Decision, Trial
from mae_et.runs.record_files import read_record, write_record
from mae_et.runs.records import RECORD_VERSION, Count, Fraction, MaybeNumber, Number, Record, Text
from mae_et.storage.atomic import atomic_path

SEARCH, TRIALS, TRIAL = "search.json", "trials", "trial.json"
TREE: Final = "tree.png"


class TrialRecord(Record):
    """trials/NAME/trial.json: a trial that is done."""

    record_version: Literal[2] = RECORD_VERSION
    name: Text
    status: Literal["finished", "pruned"] = "finished"
    bandwidths: list[Count]  # px, of the stages that were trained
    compute_fractions: list[Fraction]
    strengths: list[Fraction | None]  # None: linear in the compute done
    is_branch: bool  # scored after a proxy
    seed: Count
    start_from: Text | None  # name of the trial whose checkpoint it started from
    score: Number  # larger is better
    equivalent_epochs: Number  # spent by this trial and its proxy, by area
    real_epochs: Number  # the same in passes over the data
    seconds: Annotated[Number, Field(ge=0)]  # of training


class Level(Record):
    """A decision of the search. `scores` are by candidate, of each seed."""

    stage: Count
    scores: dict[Annotated[int, Field(ge=1, le=10**6)], Annotated[list[Number], Field(min_length=1)]]
    limit: Number
    chosen: Count
    why: Text

    @classmethod
    def of(cls, decision: Decision) -> Level:
        return cls(**decision.model_dump())


class Row(Record):
    """A stage of the curriculum that was found."""

    compute_fraction: Fraction
    bandwidth: Count
    strength: Fraction | None


class FoundRecord(Record):
    """The result of a search."""

    stages: Annotated[list[Row], Field(min_length=1)]
    equivalent_epochs: Number  # of the curriculum
    score: MaybeNumber  # mean over the seeds
    trials: list[Text]  # that trained it
    noise: Number
    margin: Number
    why: Text
    decisions: list[Level]
    num_trials: Count
    spent_equivalent_epochs: Number
    seconds: Annotated[Number, Field(ge=0)]

    @model_validator(mode="after")
    def _stages_of_decisions(self) -> FoundRecord:
        if any(not 1 <= decision.stage <= len(self.stages) for decision in self.decisions):
            raise ValueError("a decision is about a stage that does not exist")
        return self


class SearchRecord(Record):
    """search.json. `found` is None until the search is done."""

    record_version: Literal[2] = RECORD_VERSION
    kind: Literal["search"] = "search"
    settings: SearchConfig  # with candidates, proxy_epochs and score as used
    config: dict[str, Any]  # of the training
    data_fingerprint: list[Text]
    planned_equivalent_epochs: tuple[Number, Number]  # least and most that the search can cost
    found: FoundRecord | None = None


def read_trials(folder: Path) -> list[TrialRecord]:
    """Returns the records of the trials of a search that are done, by name. Errors as for `read_record`."""
    paths = sorted((folder / TRIALS).glob(f"*/{TRIAL}"))
    return [read_record(path, TrialRecord) for path in paths]


def record_of(trial: Trial, **measured: Any) -> TrialRecord:
    """Returns the record of a trial with what was measured: score, equivalent_epochs, real_epochs, seconds."""
    rows = trial.rows[: trial.num_rows]
    return TrialRecord(
        name=trial.name,
        bandwidths=[row.bandwidth for row in rows],
        compute_fractions=[row.compute_fraction for row in rows],
        strengths=[row.strength for row in rows],
        is_branch=trial.is_branch,
        seed=trial.seed,
        start_from=trial.start_from,
        **measured,
    )


def write_search(folder: Path, record: SearchRecord) -> None:
    """Writes search.json, whole or not at all."""
    write_record(folder / SEARCH, record)


def write_table(folder: Path, trials: Sequence[TrialRecord], chosen: Sequence[str] = ()) -> None:
    """Writes trials.csv: each trial in a row."""
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    columns = [name for name in TrialRecord.model_fields if name != "record_version"]
    table.writerow([*columns, "found"])
    for trial in trials:
        values = trial.model_dump()
        cells = [" ".join(map(str, cell)) if isinstance(cell, list) else cell for cell in map(values.get, columns)]
        table.writerow([*("" if cell is None else cell for cell in cells), trial.name in chosen])
    with atomic_path(folder / "trials.csv") as temporary:
        temporary.write_text(stream.getvalue(), encoding="utf-8")


def write_curriculum(path: Path, stages: Sequence[StageConfig], equivalent_epochs: float, how: str) -> None:
    """Writes the curriculum as a config file with the section `curriculum` alone.

    Args:
        path: of the file.
        stages: the rows.
        equivalent_epochs: the budget that they were found for.
        how: a line that says where they come from.
    """
    rows = [
        "        dict("
        + ", ".join(f"{key}={value!r}" for key, value in row.model_dump().items() if value is not None)
        + "),"
        for row in stages
    ]
    lines = [
        f'"""{how}',
        "",
        "Use it with any config: --cfg-options curriculum.file=PATH_OF_THIS_FILE, or as _base_ of a config.",
        '"""',
        "",
        "curriculum = dict(",
        '    preset="custom",',
        f"    equivalent_epochs={equivalent_epochs!r},",
        "    stages=[",
        *rows,
        "    ],",
        ")",
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
