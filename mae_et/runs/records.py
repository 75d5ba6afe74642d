"""The records that runs leave: summary.json, test_summary.json and environment.json of every task.

The tasks write these models and the report reads them; nothing else defines the files. A change of a field raises
`RECORD_VERSION`. Numbers that are not finite are written as null, because JSON has no NaN.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
)

from mae_et.config.data import as_sides
from mae_et.curriculum.hours import Measurement
from mae_et.models.sizes import Size, plain_size

RECORD_VERSION: Final = 2
LIMIT = 1e30  # sums and squares of numbers below it stay finite

BACKBONE_KINDS = ("pretrain", "supervised")  # trainings that end with a backbone file
CLASSIFY_KINDS = ("finetune", "linear_probe", "attentive_probe", "linear_sweep", "knn")
DENSE_PROBE = "dense_probe"
DENSE_KINDS = ("detection", "segmentation")
KINDS = (*BACKBONE_KINDS, *CLASSIFY_KINDS, DENSE_PROBE, *DENSE_KINDS)
# The range of a metric by the beginning of its name; COCO's are fractions, mmsegmentation's are percent.
METRIC_RANGES = {"coco/": (0.0, 1.0), "mIoU": (0.0, 100.0), "mAcc": (0.0, 100.0), "aAcc": (0.0, 100.0)}


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Count = Annotated[int, Field(strict=True, ge=0, le=10**15)]
Number = Annotated[float, Field(strict=True, ge=-LIMIT, le=LIMIT)]
MaybeNumber = Annotated[Number | None, BeforeValidator(_finite_or_none)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
MaybeFraction = Annotated[Fraction | None, BeforeValidator(_finite_or_none)]
Text = Annotated[str, Field(strict=True)]
# (height, width) in px; a square is written as an int.
Sides = Annotated[tuple[Count, Count], BeforeValidator(as_sides), PlainSerializer(plain_size, when_used="json")]


class Record(BaseModel):
    """A typed JSON object; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Environment(Record):
    """environment.json: the command, the versions and the hardware of a run. None: not recorded."""

    record_version: Literal[2] = RECORD_VERSION
    command: list[Text]
    mae_et: Text
    python: Text | None
    torch: Text
    timm: Text | None
    numpy: Text | None
    mmdet: Text | None = None
    mmseg: Text | None = None
    platform: Text | None
    processor: Text | None
    device: Text  # "cpu" or the GPU's name
    cuda: Text | None
    num_threads: Count | None
    world_size: Annotated[Count, Field(ge=1)]


class InitialWeights(Record):
    """The weights that a run started from. A record without them started from random weights."""

    file: Text  # path or name as the user gave it; "timm": weights that timm downloads
    sha256: Text | None  # of the file
    encoder_sha256: Text | None  # of the encoder's tensors: results join their pre-training by it
    metadata: dict[str, Text]  # of the file, about its pre-training
    role: Literal["backbone", "model"] = "backbone"  # "model": a whole checkpoint (`load_from`)


class Summary(Record):
    """The part that all summaries share.

    `counts` holds what was dropped, converted or clipped, by name; `notes` says the same in words.
    """

    record_version: Literal[2] = RECORD_VERSION
    status: Literal["finished", "tested"] = "finished"
    seconds: Annotated[Number, Field(ge=0)]  # pre-training and classification: without validation and saving
    peak_memory_mb: MaybeNumber  # of the main process, in 2^20 bytes
    initial_weights: InitialWeights | None
    data_findings: dict[str, list[dict[str, Text]]] = {}  # of the inspection: severity -> kind, text and fix
    counts: dict[str, Count] = {}
    notes: list[Text] = []


class _SizedStage(BaseModel):
    """A stage of the curriculum and the size of its images."""

    bandwidth: Count  # px, of the shorter side
    input_size: Sides | None = None  # px: a side or [height, width]; None in records before rectangles

    @property
    def size(self) -> Size:
        """Returns (height, width) of the images, px."""
        return self.input_size or (self.bandwidth, self.bandwidth)


class StageSummary(_SizedStage, Record):
    """One stage of the curriculum. Speeds are relative to the stage at full image size; None without such a stage."""

    num_steps: Count
    num_images: Count
    num_fresh_images: Count
    load_reduction: Number
    seconds: Number
    images_per_second: Number
    waiting_fraction: Number
    petaflops: Number
    tflops_per_second: MaybeNumber
    mfu: MaybeNumber
    speed_over_full_size: MaybeNumber
    ideal_by_area: Number
    ideal_by_flops: MaybeNumber
    speed_over_ideal_by_area: MaybeNumber
    speed_over_ideal_by_flops: MaybeNumber


class TrainingSummary(Summary):
    """What a training on the project's own loop cost. See `runs.summary.summarize` for the speed-ups."""

    num_steps: Count
    num_images: Count
    num_fresh_images: Count
    refilled_images: Count
    refill_seconds: Number
    load_reduction: Number
    dataset_size: Count
    equivalent_epochs: Number
    real_epochs: Number
    train_petaflops: Number
    images_per_second: Number
    waiting_fraction: Number
    tflops_per_second: MaybeNumber
    mfu: MaybeNumber
    peak_tflops: MaybeNumber
    stages: list[StageSummary]
    baseline_equivalent_epochs: Number
    nominal_speedup: Number
    nominal_speedup_flops: Number
    speedup_against_baseline: MaybeNumber
    speedup_over_nominal: MaybeNumber
    speedup_over_nominal_flops: MaybeNumber
    first_loss: MaybeNumber
    last_loss: MaybeNumber
    bad_images: Count
    skipped_steps: Count
    lost_entries: dict[str, Count] = {}
    world_size: Count


class PretrainSummary(TrainingSummary):
    """A pre-training."""

    kind: Literal["pretrain"] = "pretrain"
    encoder_sha256: Text
    knn_top1_before: MaybeFraction
    knn_top1_after: MaybeFraction
    held_out_loss: MaybeNumber = None  # these three after the last step; None without run.label_free_interval
    rankme: MaybeNumber = None
    alpha_req: MaybeNumber = None


class Accuracy(Record):
    """Accuracies on the validation images, as fractions; `top1_interval_95` covers the choice of the images only."""

    top1: Fraction
    top1_interval_95: tuple[Fraction, Fraction]
    top5: MaybeFraction  # None: not ranked, or fewer than six classes
    num_val: Annotated[Count, Field(ge=1)]
    num_classes: Count
    unreadable_val_images: Count


class ClassifierSummary(Accuracy, TrainingSummary):
    """Fine-tuning, a linear probe or an attentive probe."""

    kind: Literal["finetune", "linear_probe", "attentive_probe"]
    top1_history: list[tuple[Count, MaybeFraction]]  # (step, top-1)


class SupervisedSummary(TrainingSummary):
    """A supervised training. Accuracies are as in `Accuracy`; None without validation images."""

    kind: Literal["supervised"] = "supervised"
    model: Text  # timm's name
    encoder_sha256: Text
    num_classes: Count
    top1: MaybeFraction = None
    top1_interval_95: tuple[Fraction, Fraction] | None = None
    top5: MaybeFraction = None
    num_val: Count = 0
    unreadable_val_images: Count = 0
    top1_history: list[tuple[Count, MaybeFraction]] = []  # (step, top-1 at full size)


class CachedSummary(Accuracy, Summary):
    """The part that protocols on cached features share. Accuracies are means over the draws of labels."""

    num_train: Count  # labelled images of a draw
    unreadable_train_images: Count
    feature_seconds: Number
    top1_by_draw: list[Fraction] = []  # empty: all labels are used
    top1_sd: MaybeNumber = None  # sample standard deviation over the draws; None below two draws


class KnnSummary(CachedSummary):
    """k nearest neighbours on frozen features."""

    kind: Literal["knn"] = "knn"
    k: Count
    top1_by_k: dict[int, Fraction]
    temperature: Number
    knn_seconds: Number


class ChosenHead(Record):
    """The hyper-parameters that a sweep chose on a part of the training images."""

    seed: Count  # of the draw of labels, of the part and of the order of training
    lr: Number
    weight_decay: Number
    accuracy: MaybeFraction  # on that part; None: there was one pair, so nothing to choose
    num_images: Count  # of that part


class LinearSweepSummary(CachedSummary):
    """A linear probe on frozen features with a sweep of learning rate and weight decay."""

    kind: Literal["linear_sweep"] = "linear_sweep"
    chosen: list[ChosenHead]  # of each draw
    sweep_seconds: Number


class DenseScores(Record):
    """Scores of label maps over all validation images, as fractions; None: no pixel to count."""

    miou: MaybeFraction
    boundary_iou: MaybeFraction  # mean over the classes
    pixel_accuracy: MaybeFraction


class DenseProbeSummary(Summary):
    """Linear and kNN probe of frozen patch features against masks."""

    kind: Literal["dense_probe"] = "dense_probe"
    linear: DenseScores
    knn: DenseScores
    chosen: ChosenHead  # of the linear probe
    k: Count
    temperature: Number
    image_size: tuple[Count, Count]  # (height, width), px
    num_classes: Count
    num_train: Count  # images
    num_val: Annotated[Count, Field(ge=1)]
    num_patches: Count  # of the training images
    unreadable_train_images: Count
    unreadable_val_images: Count
    unlabelled_fraction: MaybeFraction  # of the validation pixels
    feature_seconds: Number


class _Dense(Summary):
    """The part that trainings and evaluations of detection and segmentation share."""

    kind: Literal["detection", "segmentation"]
    metrics: dict[str, MaybeNumber]  # names and units of the library; null: undefined, as AP without any object
    weights_sha256: Text | None  # of the whole model: an evaluation joins its training by it
    model: Text | None
    backbone_type: Text | None
    config: Text
    data: Text | None
    data_splits: dict[str, Text | None]
    num_val: Count | None
    max_iters: Count | None
    seed: int | None
    world_size: Annotated[Count, Field(ge=1)]
    messages: list[Text] = []  # logged by our checks and loaders
    new_heads: list[Text] = []  # layers that `load_from` did not fit: another number of classes

    @field_validator("metrics")
    @classmethod
    def _is_in_range(cls, metrics: dict[str, float | None]) -> dict[str, float | None]:
        for name, value in metrics.items():
            low, high = next((span for start, span in METRIC_RANGES.items() if name.startswith(start)), (-LIMIT, LIMIT))
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} = {value:g} is outside [{low:g}, {high:g}]")
        return metrics


class DenseSummary(_Dense):
    """A training with mmdetection or mmsegmentation; `seconds` includes validation and saving, `train_seconds` does not."""

    all_metrics: list[dict[str, MaybeNumber]]
    num_steps: Count
    num_steps_this_process: Count
    first_loss: MaybeNumber
    last_loss: MaybeNumber
    images_per_second: MaybeNumber
    train_seconds: Number


class TestSummary(_Dense):
    """test_summary.json or test_summary_tta.json: an evaluation of a checkpoint."""

    __test__ = False  # not a test class of pytest

    status: Literal["tested"] = "tested"
    tta: bool  # several scales and flips
    checkpoint: Text | None


class PlanStage(_SizedStage):
    """The part of a plan's stage that the report reads."""

    model_config = ConfigDict(frozen=True)

    num_images: Count


class Resolved(Record):
    """What a run decided at its first start, in plan.json. A resumed run keeps it. None: without curriculum.budget_hours."""

    precision: Literal["fp32", "bf16", "fp16"]
    budget_hours: float | None = None
    equivalent_epochs: float | None = None  # that fit the hours
    planned_seconds: float | None = None  # of the whole run, from the measurement
    measurement: Measurement | None = None


class PlanRecord(BaseModel):
    """The part of plan.json that the report reads; `Plan.to_dict` writes the file."""

    model_config = ConfigDict(frozen=True)

    stages: list[PlanStage]
    dataset_size: Count


AnySummary = Annotated[
    PretrainSummary
    | SupervisedSummary
    | ClassifierSummary
    | KnnSummary
    | LinearSweepSummary
    | DenseProbeSummary
    | DenseSummary,
    Field(discriminator="kind"),
]  # what summary.json may hold
