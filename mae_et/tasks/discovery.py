"""The discovery study: ordinary runs that show which frequencies a network learns first.

Every run trains at full image size with the budget of the config. Only the crop of the study "prefix" differs. Radii, parts
and times of evaluation are settings of this project: the papers do not give them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_et.config.files import load_config
from mae_et.config.filters import FilterConfig
from mae_et.config.schema import RESUME_FREE, PretrainConfig, changed_keys, from_dict, to_dict
from mae_et.config.supervised import SupervisedConfig
from mae_et.config.training import CurriculumConfig, TrainConfig
from mae_et.curriculum.plan import Plan, make_plan
from mae_et.curriculum.presets import curriculum_rows
from mae_et.errors import ConfigError, StoppedEarly, UserError
from mae_et.models.sizes import area_ratio, as_size, size_at
from mae_et.runs.record_files import write_record
from mae_et.runs.study import RUNS_FOLDER, STUDY_FILE, StudyName, StudyRecord, StudyRun, Variant
from mae_et.storage.checkpoint import list_checkpoints
from mae_et.tasks.pretrain import MAETask
from mae_et.tasks.run import TrainingTask, run_training
from mae_et.tasks.supervised import SupervisedTask

log = logging.getLogger(__name__)

AnyConfig = PretrainConfig | SupervisedConfig

NEED_ACCURACY: tuple[StudyName, ...] = ("train_filtered", "val_filtered", "low_high", "prefix")
# What may differ between a finished run and the one planned: where the work is done, not what is measured.
FREE = RESUME_FREE - {"data.val_filters", "run.knn_interval", "run.knn_max_images", "eval_interval"}


@dataclass(frozen=True)
class StudyOptions:
    """What is studied."""

    studies: tuple[StudyName, ...]
    radii: tuple[float, ...] = (20.0, 40.0, 60.0, 80.0, 112.0)  # low-pass, px of the spectrum of a 224 px image
    high_radii: tuple[float, ...] = (8.0, 16.0, 32.0, 64.0)  # high-pass, for "low_high"
    shape: str = "circle"
    bandwidths: tuple[int, ...] | None = None  # of the crop in "prefix", px; None: those of the preset "etpp"
    parts: tuple[float, ...] = (0.25, 0.5, 0.75)  # of the images shown, for "prefix"
    seeds: tuple[int, ...] = (0,)
    num_evaluations: int = 20


@dataclass(frozen=True)
class PlannedRun:
    """A run with its config and its plan."""

    record: StudyRun
    config: AnyConfig
    plan: Plan

    @property
    def num_views(self) -> int:
        """Times that an accuracy encodes each of its images; 0 without accuracies."""
        data = self.config.data
        return 0 if data.val is None else 1 + len(data.val_filters)


@dataclass(frozen=True)
class Study:
    """All runs of a study."""

    record: StudyRecord
    runs: tuple[PlannedRun, ...]
    task_type: type[TrainingTask]


def plan_study(config: AnyConfig, options: StudyOptions) -> Study:
    """Plans all runs. Opens the data, because the number of images decides the steps.

    Args:
        config: of a run at full size; its curriculum is replaced by the preset "constant".
        options: what is studied.
    Raises:
        ConfigError: if a run cannot be planned, or the config lacks what a study needs.
    """
    _check(config, options)
    task_type: type[TrainingTask] = MAETask if isinstance(config, PretrainConfig) else SupervisedTask
    data = task_type.open_data(config)
    notes = _regularization_notes(config)
    if config.curriculum.preset != "constant":
        notes.append(
            f"all runs train at full size: curriculum.preset = {config.curriculum.preset!r} becomes 'constant'"
        )
    values, size_multiple = _full_size(config), task_type.cost(config).size_multiple
    num_train = len(data.train)
    baseline = _plan(config, values, task_type, num_train)
    interval = max(1, round(baseline.num_steps / options.num_evaluations))
    runs = []
    for seed in options.seeds:
        for variant in _variants(config, options, size_multiple, notes):
            changed = _changed(values, variant, options, interval, seed, size_multiple)
            own = _config(config, changed, variant.group)
            plan = _plan(config, changed, task_type, num_train)
            described = StudyRun(
                name=f"{variant.group}_seed{seed}", group=variant.group, variant=variant.kind,
                studies=list(variant.studies), filter=variant.filter and FilterConfig(**variant.filter).name,
                radius=variant.filter and variant.filter["radius"], bandwidth=variant.bandwidth, until=variant.until,
                seed=seed, num_steps=plan.num_steps, equivalent_epochs=plan.planned_equivalent_epochs,
                real_epochs=plan.real_epochs, petaflops=plan.train_petaflops,
            )  # fmt: skip
            runs.append(PlannedRun(described, own, plan))
    num_val = 0 if data.val is None else len(data.val)
    record = StudyRecord(
        kind="pretrain" if isinstance(config, PretrainConfig) else "supervised",
        studies=list(options.studies),
        metric="knn/top1" if isinstance(config, PretrainConfig) else "val/top1",
        num_val=min(num_val, config.run.knn_max_images) if isinstance(config, PretrainConfig) else num_val,
        model=f"MAE, ViT-{config.model.size}" if isinstance(config, PretrainConfig) else config.model.name,
        data=config.data.train,
        image_size=config.data.image_size,
        norm_pix_loss=config.model.norm_pix_loss if isinstance(config, PretrainConfig) else None,
        low_filters=[FilterConfig(**row).name for row in _low(options)],
        high_filters=[FilterConfig(**row).name for row in _high(options)],
        notes=notes,
        runs=[run.record for run in runs],
    )
    return Study(record, tuple(runs), task_type)


def status(run: PlannedRun, work_dir: Path) -> str:
    """Returns "finished", "started" or "new".

    Raises:
        UserError: if the run's folder holds a run of another config.
    """
    folder = work_dir / RUNS_FOLDER / run.record.name
    if not (folder / "config.py").exists():
        return "new"
    try:
        before = to_dict(load_config(type(run.config), folder / "config.py"))
    except ConfigError as error:
        raise UserError(f"{folder} holds a run that this version cannot read: choose another --work-dir") from error
    if changes := changed_keys(before, to_dict(run.config), FREE):
        raise UserError(
            f"{folder} holds a run of another config:\n" + "\n".join(f"  - {change}" for change in changes) + "\n"
            "Choose another --work-dir, or give the options of the earlier study"
        )
    if (folder / "summary.json").exists():
        return "finished"
    return "started" if list_checkpoints(folder / "checkpoints") else "new"


def run_study(study: Study, work_dir: Path, device: str | None = None) -> None:
    """Runs what is not finished, one run after the other, and writes study.json.

    Args:
        study: as planned.
        work_dir: gets study.json and runs/.
        device: as for `run_training`.
    Raises:
        StoppedEarly: SIGTERM or Ctrl-C. The run in progress is saved; the same command continues.
        UserError: as for `run_training`.
    """
    states = [status(run, work_dir) for run in study.runs]  # all conflicts before any work
    work_dir.mkdir(parents=True, exist_ok=True)
    write_record(work_dir / STUDY_FILE, study.record)
    for i, (run, state) in enumerate(zip(study.runs, states, strict=True), 1):
        if state == "finished":
            log.info("run %d of %d, %s: finished", i, len(study.runs), run.record.name)
            continue
        log.info("run %d of %d: %s", i, len(study.runs), run.record.name)
        try:
            run_training(study.task_type, run.config, work_dir / RUNS_FOLDER / run.record.name, True, device)
        except StoppedEarly as stop:
            raise StoppedEarly(
                f"stopped in run {i} of {len(study.runs)}, {run.record.name}. Everything is saved: run the same command to "
                "continue"
            ) from stop


@dataclass(frozen=True)
class _Variant:
    """What makes a run differ from the baseline."""

    group: str
    kind: Variant
    studies: tuple[StudyName, ...]
    filter: Mapping[str, Any] | None = None
    bandwidth: int | None = None
    until: float = 1.0


def _variants(config: TrainConfig, options: StudyOptions, size_multiple: int, notes: list[str]) -> Iterator[_Variant]:
    yield _Variant("baseline", "baseline", options.studies)
    if "train_filtered" in options.studies:
        for row in _low(options):
            yield _Variant(FilterConfig(**row).name, "filter", ("train_filtered",), filter=row)
    if "prefix" not in options.studies:
        return
    has_ramp = config.data.augmentation.ramp != "none"
    if not has_ramp:
        notes.append(
            "the study prefix leaves out weak augmentation: with data.augmentation.ramp = 'none' nothing follows the strength. "
            "Set it to 'crop_scale' or 'randaugment'"
        )
    bandwidths = options.bandwidths
    if bandwidths is None:
        rows, _ = curriculum_rows(CurriculumConfig(preset="etpp"), config.data.image_size, size_multiple)
        bandwidths = tuple(sorted({row.bandwidth for row in rows} - {min(config.data.image_size)}))
    for part in options.parts:
        prefix = f"first{100 * part:g}"
        for row in _low(options):
            yield _Variant(f"{prefix}_{FilterConfig(**row).name}", "filter", ("prefix",), filter=row, until=part)
        for bandwidth in bandwidths:
            yield _Variant(f"{prefix}_crop_{bandwidth}", "crop", ("prefix",), bandwidth=bandwidth, until=part)
        if has_ramp:
            yield _Variant(f"{prefix}_weak_augmentation", "weak_augmentation", ("prefix",), until=part)


def _regularization_notes(config: AnyConfig) -> list[str]:
    """Says what acts on filtered training images after the filter."""
    if isinstance(config, PretrainConfig):
        return []
    names = [name for name in ("erasing", "cutmix") if getattr(config.regularization, name)]
    if not names:
        return []
    return [
        f"{' and '.join(f'regularization.{name}' for name in names)} act after the filter, so their edges are in the training "
        "images: set them to 0 for images without these frequencies"
    ]


def _low(options: StudyOptions) -> list[dict[str, Any]]:
    return [{"kind": "low_pass", "radius": radius, "shape": options.shape} for radius in sorted(options.radii)]


def _high(options: StudyOptions) -> list[dict[str, Any]]:
    return [{"kind": "high_pass", "radius": radius, "shape": options.shape} for radius in sorted(options.high_radii)]


def _full_size(config: TrainConfig) -> dict[str, Any]:
    """Returns the config's values with the curriculum "constant" and one micro batch size."""
    values = to_dict(config)
    values["curriculum"] |= {"preset": "constant", "stages": [], "centered": True}
    sizes = config.batch.micro_batch_sizes
    values["batch"] |= {
        "micro_batch_sizes": [],
        "micro_batch_size": sizes[-1] if sizes else config.batch.micro_batch_size,
    }
    return values


def _changed(
    values: Mapping[str, Any], variant: _Variant, options: StudyOptions, interval: int, seed: int, size_multiple: int
) -> dict[str, Any]:
    """Returns the values of one run: the baseline's with what the variant changes, and the times of evaluation."""
    curriculum, data, run, model = (dict(values[name]) for name in ("curriculum", "data", "run", "model"))
    image_size = as_size(data["image_size"])
    val_filters: list[dict[str, Any]] = []
    if variant.kind == "baseline":
        val_filters += _low(options) if {"val_filtered", "low_high"} & set(options.studies) else []
        val_filters += _high(options) if "low_high" in options.studies else []
    elif variant.filter is not None:
        data["filter"] = {**variant.filter, "until": variant.until}
        val_filters += [dict(variant.filter)] if "train_filtered" in variant.studies else []
    elif variant.kind == "crop":
        assert variant.bandwidth is not None
        share = area_ratio(size_at(variant.bandwidth, image_size, size_multiple), image_size)
        # As many images as the baseline shows; the cropped ones cost less.
        cost = variant.until * share + 1 - variant.until
        for key in ("equivalent_epochs", "warmup_equivalent_epochs"):
            curriculum[key] *= cost
        if model.get("drop_path_epochs"):
            model["drop_path_epochs"] *= cost  # the drop path stays that of the baseline
        curriculum |= _stages(variant.until * share / cost, (variant.bandwidth, 1.0), (min(image_size), 1.0))
    else:
        curriculum |= _stages(variant.until, (min(image_size), 0.0), (min(image_size), 1.0))
    own = {
        "curriculum": curriculum,
        "data": {**data, "val_filters": val_filters},
        "run": {**run, "seed": seed},
        "model": model,
    }
    changed = {**values, **own}
    if data["val"] is not None:
        times, key = (own["run"], "knn_interval") if "knn_interval" in run else (changed, "eval_interval")
        times[key] = interval
    return changed


def _stages(fraction: float, first: tuple[int, float], then: tuple[int, float]) -> dict[str, Any]:
    """Returns a curriculum of two stages of (bandwidth, strength); the first takes a fraction of the compute."""
    rows = [
        {"compute_fraction": part, "bandwidth": bandwidth, "strength": strength}
        for part, (bandwidth, strength) in ((fraction, first), (1 - fraction, then))
        if part > 1e-9
    ]
    return {"preset": "custom", "stages": rows}


def _config(config: TrainConfig, values: Mapping[str, Any], name: str) -> Any:
    return from_dict(type(config), values, f"run {name} of the study")


def _plan(config: TrainConfig, values: Mapping[str, Any], task_type: type[TrainingTask], num_train: int) -> Plan:
    own = _config(config, values, "")
    return make_plan(own, task_type.cost(own), num_train)


def _check(config: AnyConfig, options: StudyOptions) -> None:
    faults = []
    needing = [name for name in NEED_ACCURACY if name in options.studies]
    if needing and config.data.val is None:
        faults.append(f"data.val is missing: {', '.join(needing)} measure an accuracy on labelled images")
    if config.data.filter.kind != "none":
        faults.append(f"data.filter.kind = {config.data.filter.kind!r}: the study sets the filters itself; set 'none'")
    if "bands" in options.studies and not isinstance(config, PretrainConfig):
        faults.append("the study bands measures reconstructions: give a pre-training config, or leave it out")
    if "bands" in options.studies and isinstance(config, PretrainConfig) and config.model.target != "pixels":
        faults.append(f"model.target = {config.model.target!r}: the study bands needs 'pixels'")
    if not all(0 < part <= 1 for part in options.parts):
        faults.append(f"parts = {list(options.parts)} must be above 0 and at most 1")
    if options.num_evaluations < 1:
        faults.append(f"evaluations = {options.num_evaluations} must be at least 1")
    if not all(math.isfinite(radius) for radius in (*options.radii, *options.high_radii)):
        faults.append("radii must be finite")
    for name, given in (("radii", options.radii), ("high-radii", options.high_radii), ("seeds", options.seeds)):
        if len(set(given)) < len(given):
            faults.append(f"{name} = {list(given)} has a value more than once: remove the copies")
    if faults:
        raise ConfigError(faults, "study")
