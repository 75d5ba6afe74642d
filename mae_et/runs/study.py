"""study.json: what the runs of a discovery study are. `tasks/discovery.py` writes it, `report/discovery.py` reads it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mae_et.runs.records import Count, Number, Record, Sides, Text

STUDY_FILE, RUNS_FOLDER = "study.json", "runs"
StudyName = Literal["train_filtered", "val_filtered", "low_high", "prefix", "bands"]
Variant = Literal["baseline", "filter", "crop", "weak_augmentation"]


class StudyRun(Record):
    """One run of the study. Runs that differ in the seed only have the same `group`."""

    name: Text  # its folder below runs/
    group: Text
    variant: Variant
    studies: list[StudyName]  # that use it
    filter: Text | None  # variant "filter": name of the filter of the training images, as in metrics
    radius: Number | None  # variant "filter": px of the spectrum of a 224 px image
    bandwidth: Count | None  # variant "crop": px
    until: Number  # part of the images shown that the variant covers; 1 for the whole run
    seed: Count
    num_steps: Count
    equivalent_epochs: Number
    real_epochs: Number
    petaflops: Number


class StudyRecord(Record):
    """A study: its runs, and what they have in common."""

    record_version: Literal[1] = 1
    kind: Literal["pretrain", "supervised"]
    studies: list[StudyName]
    metric: Text  # key of the accuracy in metrics.jsonl; "/" and the name of a filter follow for filtered images
    num_val: Annotated[Count, Field(ge=0)]  # images behind an accuracy; 0: none is measured
    model: Text
    data: Text
    image_size: Sides  # px: a side or [height, width]
    norm_pix_loss: bool | None  # of an MAE
    low_filters: list[Text]  # names, by rising radius
    high_filters: list[Text]
    notes: list[Text]
    runs: list[StudyRun]
