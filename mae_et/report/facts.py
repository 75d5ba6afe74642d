"""What is known about a run, under one name for all kinds of runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mae_et.config.schema import resume_free
from mae_et.config.source_list import is_list, split_sources
from mae_et.config.validation import flat
from mae_et.models.sizes import MAE_SIZES, size_text
from mae_et.report.scan import Run
from mae_et.runs.records import (
    BACKBONE_KINDS,
    CLASSIFY_KINDS,
    DENSE_KINDS,
    DENSE_PROBE,
    Accuracy,
    CachedSummary,
    DenseProbeSummary,
    DenseSummary,
    PretrainSummary,
    SupervisedSummary,
    TestSummary,
    TrainingSummary,
)  # fmt: skip

# The columns of the table: what `--query` and `--group-by` may name. The documentation site lists it.
FACTS = {
    "name": "name of the run, unique within the report",
    "kind": "pretrain, supervised, finetune, linear_probe, attentive_probe, linear_sweep, knn, dense_probe, detection, "
    "segmentation, features or reconstructions",
    "status": "finished, running, unfinished, broken or duplicate",
    "pretraining": "name of the pre-training run that the weights come from",
    "data": "name of the data set: of pre-training the training set, of results the validation set",
    "dataset_size": "training images",
    "num_val": "validation images",
    "num_classes": "classes",
    "model": "network",
    "backbone_type": "class of the backbone in detection and segmentation",
    "architecture": "timm's name of the backbone in detection and segmentation",
    "config": "config file of detection and segmentation",
    "seed": "seed of the run",
    "target": "target of pre-training, or class labels; a result has that of its pre-training",
    "curriculum": "curriculum of pre-training; a result has that of its pre-training",
    "equivalent_epochs": "compute of the run, in passes over the data at full image size, by area",
    "baseline_equivalent_epochs": "budget of the baseline that the config names",
    "real_epochs": "passes over the data",
    "num_steps": "optimizer steps",
    "max_iters": "iterations of detection and segmentation",
    "images_seen": "images shown, repeats counted",
    "fresh_images": "images decoded, where a replay buffer showed some again",
    "load_reduction": "images shown per image decoded",
    "seconds": "wall time in s",
    "images_per_second": "images per second",
    "waiting_fraction": "fraction of the time spent waiting for data",
    "petaflops": "counted compute in PFLOP, forward and backward",
    "mfu": "model FLOPs utilization in percent",
    "device": "cpu, or the name of the GPU",
    "num_devices": "processes",
    "num_threads": "CPU threads of each process",
    "gpu_hours": "GPUs x wall time",
    "core_hours": "processes x threads x wall time on CPUs",
    "peak_memory_mb": "peak memory of the main process in 2^20 bytes",
    "nominal_speedup": "baseline budget / budget",
    "own_speedup": "time of the baseline budget at the run's own full-size speed / time of the run",
    "first_loss": "first logged loss",
    "last_loss": "last logged loss",
    "bad_images": "images that could not be decoded",
    "skipped_steps": "steps skipped because of a non-finite value",
    "knn_before": "kNN top-1 in percent before pre-training, on a subset",
    "knn_after": "kNN top-1 in percent after pre-training, on a subset",
    "held_out_loss": "loss on held-out images at full size after pre-training",
    "rankme": "RankMe of the features of held-out images after pre-training",
    "alpha_req": "alpha-ReQ of the features of held-out images after pre-training",
    "top1": "top-1 accuracy in percent",
    "top1_sd": "standard deviation of the top-1 accuracy over the draws of labels, in points",
    "top5": "top-5 accuracy in percent",
    **{
        f"{name}_{key}": f"{label} of the {said} on patch features in percent"
        for name, said in (("linear", "linear probe"), ("knn", "kNN probe"))
        for key, label in (("miou", "mean IoU"), ("boundary_iou", "Boundary IoU"), ("pixel_accuracy", "pixel accuracy"))
    },
    **{
        f"{part}_ap{size}": f"COCO {part} AP{size} in percent"
        for part in ("box", "mask")
        for size in ("", "50", "75", "s", "m", "l")
    },
    "miou": "mean IoU in percent",
    "macc": "mean class accuracy in percent",
    "aacc": "pixel accuracy in percent",
    "miou_ms": "mean IoU in percent, multi-scale + flip",
    "macc_ms": "mean class accuracy in percent, multi-scale + flip",
    "aacc_ms": "pixel accuracy in percent, multi-scale + flip",
}
SIZES = {"": "", "50": "_50", "75": "_75", "s": "_s", "m": "_m", "l": "_l"}
BOX = {f"box_ap{size}": f"coco/bbox_mAP{name}" for size, name in SIZES.items()}
MASK = {f"mask_ap{size}": f"coco/segm_mAP{name}" for size, name in SIZES.items()}
AREA = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}
SPLITS = {"train", "val", "valid", "validation", "test", "training", "images", "train2017", "val2017"}
SEED = {"run.seed", "randomness.seed"}
# Keys of mmengine's configs that say where things are or what is shown; they do not change a result.
PLACES = re.compile(
    r"(^|\.)(work_dir|data_root|ann_file|checkpoint|load_from|resume|launcher|filename|save_dir|num_workers|persistent_workers)$"
    r"|^(default_hooks|custom_hooks|visualizer|vis_backends|env_cfg|log_level|log_processor|launcher|custom_imports)\b|init_cfg"
)


def describe(run: Run) -> dict[str, Any]:
    """Returns the facts of a run that are known: percentages in percent, times in seconds."""
    facts: dict[str, Any] = {"kind": run.kind, "name": run.name, "status": run.status}
    seconds = None if run.summary is None else run.summary.seconds
    facts |= _hardware(run, seconds) | {"seconds": seconds}
    facts["peak_memory_mb"] = None if run.summary is None else run.summary.peak_memory_mb
    facts["pretraining"] = run.source.name if run.source is not None and run.source.kind in BACKBONE_KINDS else None
    if isinstance(run.summary, TrainingSummary):
        facts |= _training(run.summary)
    if run.kind in BACKBONE_KINDS:
        facts |= _backbone(run)
    elif run.kind in DENSE_KINDS:
        facts |= _dense(run)
    elif run.kind == "features":
        facts["data"] = data_name(run.about.get("data"))
    elif run.kind in CLASSIFY_KINDS:
        facts |= _classify(run)
    elif run.kind == DENSE_PROBE:
        facts |= _dense_probe(run)
    return {key: value for key, value in facts.items() if value is not None}


def _hardware(run: Run, seconds: float | None) -> dict[str, Any]:
    machine = run.environment
    if machine is None:
        return {}
    known = {"device": machine.device, "num_devices": machine.world_size}
    if machine.device != "cpu":
        return {**known, "gpu_hours": None if seconds is None else seconds * machine.world_size / 3600}
    hours = None
    if seconds is not None and machine.num_threads is not None:
        hours = seconds * machine.world_size * machine.num_threads / 3600
    return {**known, "num_threads": machine.num_threads, "core_hours": hours}


def _training(summary: TrainingSummary) -> dict[str, Any]:
    same = ("dataset_size", "real_epochs", "num_steps", "images_per_second", "first_loss", "last_loss", "bad_images",
            "skipped_steps", "load_reduction", "waiting_fraction", "equivalent_epochs")  # fmt: skip
    return {**{key: getattr(summary, key) for key in same}, "petaflops": summary.train_petaflops}


def _backbone(run: Run) -> dict[str, Any]:
    """Pre-training and supervised training."""
    model, curriculum, data = (_part(run.config, key) for key in ("model", "curriculum", "data"))
    target = model.get("target")
    if target in (None, "pixels") and isinstance(model.get("norm_pix_loss"), bool):
        target = "normalised pixels" if model["norm_pix_loss"] else "pixels"
    if run.kind == "supervised":
        target = "class labels"
    facts: dict[str, Any] = {
        "data": data_name(data.get("train")),
        "model": model_name(model, data.get("image_size")),
        "target": target if isinstance(target, str) else None,
        "curriculum": curriculum_name(curriculum.get("preset"), bandwidths(run)),
        "seed": _seed(_part(run.config, "run").get("seed")),
    }
    for key in ("equivalent_epochs", "baseline_equivalent_epochs"):
        facts[key] = _number(curriculum.get(key)) or getattr(run.summary, key, None)
    if run.plan is not None and run.summary is None:
        facts["dataset_size"] = run.plan.dataset_size
    summary = run.summary
    if isinstance(summary, PretrainSummary | SupervisedSummary):
        facts |= {
            "images_seen": summary.num_images,
            "fresh_images": summary.num_fresh_images if summary.load_reduction > 1 else None,
            "mfu": None if summary.mfu is None else 100 * summary.mfu,
            "nominal_speedup": summary.nominal_speedup,
            "own_speedup": summary.speedup_against_baseline,
        }
    if isinstance(summary, PretrainSummary):
        facts |= {
            "knn_before": None if summary.knn_top1_before is None else 100 * summary.knn_top1_before,
            "knn_after": None if summary.knn_top1_after is None else 100 * summary.knn_top1_after,
            **{key: getattr(summary, key) for key in ("held_out_loss", "rankme", "alpha_req")},
        }
    if isinstance(summary, SupervisedSummary):
        facts |= {"num_classes": summary.num_classes, "num_val": summary.num_val or None}
        facts |= {key: None if (value := getattr(summary, key)) is None else 100 * value for key in ("top1", "top5")}
    return facts


def _classify(run: Run) -> dict[str, Any]:
    data, summary = _part(run.config, "data"), run.summary
    facts: dict[str, Any] = {
        "data": data_name(data.get("val")) or data_name(data.get("train")),
        "model": model_name(_part(run.config, "model"), data.get("image_size")),
        "seed": _seed(_part(run.config, "run").get("seed")),
    }
    if isinstance(summary, Accuracy):
        facts |= {"num_val": summary.num_val, "num_classes": summary.num_classes, "top1": 100 * summary.top1}
        facts["top5"] = None if summary.top5 is None else 100 * summary.top5
    if isinstance(summary, CachedSummary):
        facts["dataset_size"] = summary.num_train
        facts["top1_sd"] = None if summary.top1_sd is None else 100 * summary.top1_sd
    return facts


def _dense_probe(run: Run) -> dict[str, Any]:
    summary = run.summary
    facts: dict[str, Any] = {
        "data": data_name(_part(run.config, "data").get("root")),
        "seed": _seed(_part(run.config, "run").get("seed")),
    }
    if isinstance(summary, DenseProbeSummary):
        facts |= {"num_val": summary.num_val, "num_classes": summary.num_classes, "dataset_size": summary.num_train}
        for name, scores in (("linear", summary.linear), ("knn", summary.knn)):
            for key, value in scores:
                facts[f"{name}_{key}"] = None if value is None else 100 * value
    return facts


def _dense(run: Run) -> dict[str, Any]:
    """Detection and segmentation: the metrics of a training, then those of the evaluations of its weights."""
    network = _part(_part(run.config, "model"), "backbone").get("model_name")
    record, splits = run.record, [_part(run.config, f"{split}_dataloader") for split in ("val", "test", "train")]
    if not isinstance(record, DenseSummary | TestSummary):
        roots = [data_name(_part(split, "dataset").get("data_root")) for split in splits]
        loop = _part(run.config, "train_cfg").get("max_iters")
        return {
            "data": next((root for root in roots if root), None),
            "model": _text(_part(run.config, "model").get("type")),
            "architecture": _text(network),
            "max_iters": loop if isinstance(loop, int) else None,
            "seed": _seed(_part(run.config, "randomness").get("seed")),
        }
    names, factor = ({**BOX, **MASK}, 100) if run.kind == "detection" else (AREA, 1)
    found = {}
    for suffix, is_tta in (("", False), ("_ms", True)):
        sources: list[Any] = [test for test in run.tests if test.tta is is_tta]
        if isinstance(run.summary, DenseSummary) and not is_tta:
            sources.insert(0, run.summary)
        for key, name in names.items():
            values = [value for one in sources if (value := one.metrics.get(name)) is not None]
            if values:
                found[f"{key}{suffix}"] = factor * values[-1]
    return {
        **{key: getattr(record, key) for key in ("data", "model", "backbone_type", "config", "num_val", "seed")},
        "architecture": _text(network),
        "max_iters": getattr(run.summary, "num_steps", None) or record.max_iters,
        **found,
    }


def recipe(run: Run) -> dict[str, Any]:
    """Returns what a run was asked to do, by dotted key: all that may change its result except seed and backbone."""
    names: tuple[str, ...] = ("data", "dataset_size", "model", "curriculum", "kind", "equivalent_epochs")
    if run.kind in DENSE_KINDS:
        kept = {key: value for key, value in flat(run.config) if key not in SEED and not PLACES.search(key)}
        names = ("data", "model", "backbone_type", "config", "max_iters")
    else:
        kept = {key: value for key, value in flat(run.config) if key not in resume_free(run.kind) | SEED}
    return {**{name: run.facts.get(name) for name in (*names, "num_val", "num_classes")}, **kept}


def metadata_facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the facts of a pre-training from the metadata of its backbone file, where the run itself is not given."""
    values: dict[str, Any] = {}
    for key, value in metadata.items():
        try:
            values[key] = json.loads(value)
        except (ValueError, RecursionError):
            values[key] = value
    bands = values.get("bandwidths")
    known = bands if isinstance(bands, list) and all(isinstance(band, int) for band in bands) else []
    curriculum = _part(values, "curriculum")
    facts = {
        "data": data_name(values.get("data")),
        "model": _text(values.get("architecture")),
        "target": "class labels" if values.get("objective") == "supervised" else _text(values.get("target")),
        "curriculum": curriculum_name(curriculum.get("preset"), known),
        "equivalent_epochs": _number(curriculum.get("equivalent_epochs")),
        **{key: _number(values.get(key)) for key in ("seed", "step", "num_steps")},
    }
    return {key: value for key, value in facts.items() if value is not None}


def data_name(spec: Any) -> str | None:
    """Returns the name of a data set from its path: "data/imagenet/train" -> "imagenet"."""
    if not isinstance(spec, str) or not spec.strip():
        return None
    if is_list(spec):
        return " + ".join(name for one in split_sources(spec) if (name := data_name(one))) or None
    if spec.startswith("scenes:"):
        return spec.split(",")[0]
    if spec.startswith("torchvision:"):
        return spec.removeprefix("torchvision:").split("@")[0]
    path = re.sub(r"(\.(txt|csv|tsv|parquet))?(,\w+=[^,]*)*$", "", spec.removeprefix("datasets:").strip())
    parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", ".", "..")]
    while len(parts) > 1 and (parts[-1].lower() in SPLITS or ".tar" in parts[-1]):
        parts.pop()
    return parts[-1] if parts else None


def model_name(model: Mapping[str, Any], image_size: Any) -> str | None:
    """Returns a network in few words, from a config's `model`: "ViT-base/16, 224 px"; "360 x 480 px" for rectangles."""
    px = f", {image_size:g} px" if _number(image_size) else ""
    if isinstance(image_size, list) and len(image_size) == 2 and all(map(_number, image_size)):
        px = f", {image_size[0]:g} x {image_size[1]:g} px"
    if isinstance(model.get("name"), str):
        options = ", ".join(f"{key} {value}" for key, value in _part(model, "options").items())
        return f"{model['name']}{f' ({options})' if options else ''}{px}"
    name = model.get("size")
    size = MAE_SIZES.get(name) if isinstance(name, str) else None
    if size is None:
        return None
    own = {key: _number(model.get(key)) for key in ("embed_dim", "depth", "patch_size")}
    patch = own["patch_size"] or size.patch_size
    if own["embed_dim"] in (None, size.embed_dim) and own["depth"] in (None, size.depth):
        return f"ViT-{name}/{patch:g}{px}"
    return f"ViT {own['depth'] or size.depth:g}x{own['embed_dim'] or size.embed_dim:g}/{patch:g}{px}"


def curriculum_name(preset: Any, bands: Sequence[int | str]) -> str | None:
    """Returns "etpp 96-160-224"; a run at one bandwidth is "constant 224". A bandwidth may be text such as "96 x 128"."""
    steps = [band for i, band in enumerate(bands) if i == 0 or band != bands[i - 1]]
    shown = "-".join(map(str, steps))
    if len(steps) == 1 and preset in (None, "custom", "constant"):
        return f"constant {shown}"
    return " ".join(word for word in (_text(preset), shown) if word) or None


def bandwidths(run: Run) -> list[int | str]:
    """Returns the bandwidths of the stages in px: of the plan, else of the summary, else of the log.

    That of a rectangle is text, height x width, where the plan or the summary holds both.
    """
    stages = run.plan.stages if run.plan is not None else getattr(run.summary, "stages", [])
    if stages:
        return [stage.bandwidth if stage.size == (stage.bandwidth,) * 2 else size_text(stage.size) for stage in stages]
    logged = run.metrics["bandwidth"].dropna()
    return [int(band) for band in logged[logged != logged.shift()]]


def is_constant(facts: Mapping[str, Any]) -> bool:
    return str(facts.get("curriculum", "")).startswith("constant")


def _part(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = values.get(key)
    return part if isinstance(part, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
    return float(value) if is_number else None


def _seed(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def fact(run: Run, name: str) -> Any:
    """Returns a fact; curriculum and target of a result are those of its pre-training."""
    if name in ("curriculum", "target") and run.source is not None and name not in run.facts:
        return fact(run.source, name)
    return run.facts.get(name)
