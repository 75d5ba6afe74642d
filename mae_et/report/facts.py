"""What tables, filters and groups ask of a run, by name; a key is absent where the run does not say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from mae_et.config.schema import MAE_SIZES
from mae_et.config.validation import flat
from mae_et.report.records import Run, dig, number, text

SPLITS = {"train", "val", "valid", "validation", "test", "training", "images", "train2017", "val2017"}
CLASS_METRICS = ("top1", "top5")
BOX = {
    "box_ap": "coco/bbox_mAP",
    "box_ap50": "coco/bbox_mAP_50",
    "box_ap75": "coco/bbox_mAP_75",
    "box_aps": "coco/bbox_mAP_s",
    "box_apm": "coco/bbox_mAP_m",
    "box_apl": "coco/bbox_mAP_l",
}
MASK = {key.replace("box", "mask"): name.replace("bbox", "segm") for key, name in BOX.items()}
AREA = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}
# Keys of a summary that are taken over under their own names, where a run has them.
PLAIN = (
    "real_epochs",
    "num_steps",
    "images_per_second",
    "first_loss",
    "last_loss",
    "bad_images",
    "skipped_steps",
    "load_reduction",
    "waiting_fraction",
    "peak_memory_mb",
)


def describe(run: Run) -> dict[str, Any]:
    """Returns the facts of a run, percentages in percent, times in seconds."""
    describers = {
        "pretrain": _pretrain,
        "classify": _classify,
        "detection": _dense,
        "segmentation": _dense,
        "features": _features,
    }
    facts: dict[str, Any] = {"kind": run.kind, "name": run.name, "status": run.status}
    facts |= {key: value for key in PLAIN if (value := number(run.summary, key)) is not None}
    seconds = number(run.summary, "seconds")
    facts |= {"seconds": seconds, "petaflops": number(run.summary, "train_petaflops")} | _hardware(run, seconds)
    if run.kind in describers:
        facts |= describers[run.kind](run)
    return {key: value for key, value in facts.items() if value is not None}


def config_facts(run: Run) -> dict[str, Any]:
    """Returns the config as dotted keys and plain values."""
    return dict(flat(run.config)) if run.kind in ("pretrain", "classify") else {}


def data_name(spec: Any) -> str | None:
    """Returns what a data set is called, from where it lies: "data/imagenet/train" -> "imagenet"."""
    if not isinstance(spec, str) or not spec.strip():
        return None
    if spec.startswith("scenes:"):
        return spec.split(",")[0]
    if spec.startswith("torchvision:"):
        return spec.removeprefix("torchvision:").split("@")[0]
    parts = [part for part in re.split(r"[\\/]+", spec.strip()) if part not in ("", ".", "..")]
    while len(parts) > 1 and (parts[-1].lower() in SPLITS or ".tar" in parts[-1]):
        parts.pop()
    return parts[-1] if parts else None


def model_name(model: Any, image_size: float | None) -> str | None:
    """Returns a network in few words, from a config's `model`: "ViT-base/16, 224 px"."""
    size = MAE_SIZES.get(text(model, "size") or "")
    if size is None:
        return None
    own = {key: number(model, key) for key in ("embed_dim", "depth", "patch_size")}
    patch = int(own["patch_size"] or size.patch_size)
    px = f", {image_size:g} px" if image_size else ""
    if own["embed_dim"] in (None, size.embed_dim) and own["depth"] in (None, size.depth):
        return f"ViT-{dig(model, 'size')}/{patch}{px}"
    return f"ViT {own['depth'] or size.depth:g}x{own['embed_dim'] or size.embed_dim:g}/{patch}{px}"


def curriculum_name(preset: str | None, bandwidths: list[int]) -> str | None:
    """Returns "etpp 96-160-224"; a run at one bandwidth is "constant 224"."""
    steps = [band for i, band in enumerate(bandwidths) if i == 0 or band != bandwidths[i - 1]]
    shown = "-".join(map(str, steps))
    if len(steps) == 1 and preset in (None, "custom", "constant"):
        return f"constant {shown}"
    return " ".join(word for word in (preset, shown) if word) or None


def metadata_facts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts of a pre-training from the metadata of its backbone file, where the run itself is not given."""
    values: dict[str, Any] = {}
    for key, value in metadata.items():
        try:
            values[key] = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            values[key] = value
    bands = values.get("bandwidths")
    known = bands if isinstance(bands, list) and all(isinstance(band, int) for band in bands) else []
    facts = {
        "data": data_name(values.get("data")),
        "model": text(values, "architecture"),
        "target": text(values, "target"),
        "curriculum": curriculum_name(text(values, "curriculum", "preset"), known),
        "equivalent_epochs": number(values, "curriculum", "equivalent_epochs"),
        "seed": number(values, "seed"),
        "step": number(values, "step"),
        "num_steps": number(values, "num_steps"),
    }
    return {key: value for key, value in facts.items() if value is not None}


def is_constant(facts: Mapping[str, Any]) -> bool:
    return str(facts.get("curriculum", "")).startswith("constant")


def bandwidths(run: Run) -> list[int]:
    """Returns the bandwidths of a run's stages, in px; from its logs where nothing else tells."""
    for values in (run.plan, run.summary):
        stages = dig(values, "stages")
        if isinstance(stages, list) and stages:
            found = [number(stage, "bandwidth") for stage in stages]
            if all(band is not None for band in found):
                return [int(band) for band in found if band is not None]
    logged = [int(band) for line in run.metrics if (band := number(line, "bandwidth")) is not None]
    return [band for i, band in enumerate(logged) if i == 0 or band != logged[i - 1]]


def _hardware(run: Run, seconds: float | None) -> dict[str, Any]:
    environment = run.environment or run.summary
    device = text(environment, "device")
    if device is None:
        return {}
    count = number(environment, "world_size") or number(environment, "num_processes") or 1
    if device != "cpu":
        hours = None if seconds is None else seconds * count / 3600
        return {"device": device, "num_devices": int(count), "gpu_hours": hours}
    threads = number(environment, "num_threads")
    hours = None if seconds is None or threads is None else seconds * count * threads / 3600
    return {"device": "cpu", "num_devices": int(count), "num_threads": threads, "core_hours": hours}


def _pretrain(run: Run) -> dict[str, Any]:
    summary, config, model = run.summary, run.config, dig(run.config, "model")
    preset = text(config, "curriculum", "preset")
    target = text(model, "target")
    if target in (None, "pixels") and isinstance(dig(model, "norm_pix_loss"), bool):
        target = "normalised pixels" if dig(model, "norm_pix_loss") else "pixels"
    mfu = number(summary, "mfu")
    replays = (number(summary, "load_reduction") or 1) > 1
    knn = {key: number(summary, f"knn_top1_{key}") for key in ("before", "after")}
    return {
        "data": data_name(dig(config, "data", "train")),
        "dataset_size": number(summary, "dataset_size") or number(run.plan, "dataset_size"),
        "model": model_name(model, number(config, "data", "image_size")),
        "target": target,
        "curriculum": curriculum_name(preset, bandwidths(run)),
        "equivalent_epochs": number(config, "curriculum", "equivalent_epochs") or number(summary, "equivalent_epochs"),
        "baseline_equivalent_epochs": number(config, "curriculum", "baseline_equivalent_epochs")
        or number(summary, "baseline_equivalent_epochs"),
        "images_seen": number(summary, "num_images"),
        "fresh_images": number(summary, "num_fresh_images") if replays else None,
        "mfu": None if mfu is None else 100 * mfu,
        "nominal_speedup": number(summary, "nominal_speedup"),
        "own_speedup": number(summary, "speedup_against_baseline"),
        "seed": _whole(number(config, "run", "seed")),
        **{f"knn_{key}": None if value is None else 100 * value for key, value in knn.items()},
    }


def _classify(run: Run) -> dict[str, Any]:
    summary, config = run.summary, run.config
    protocol = text(summary, "protocol") or text(config, "protocol")
    return {
        "protocol": protocol,
        "data": data_name(dig(config, "data", "val")) or data_name(dig(config, "data", "train")),
        "dataset_size": number(summary, "dataset_size") or number(summary, "num_train"),
        "num_val": number(summary, "num_val"),
        "num_classes": number(summary, "num_classes"),
        "model": model_name(dig(config, "model"), number(config, "data", "image_size")),
        "equivalent_epochs": None if protocol == "knn" else number(summary, "equivalent_epochs"),
        "seed": _whole(number(config, "run", "seed")),
        **{key: 100 * value for key in CLASS_METRICS if (value := number(summary, key)) is not None},
    }


def _dense(run: Run) -> dict[str, Any]:
    """Detection and segmentation; metrics of a training, with those of its evaluations over them."""
    told = run.summary or next(iter(run.tests), {})
    names, factor = ({**BOX, **MASK}, 100) if run.kind == "detection" else (AREA, 1)
    plain = [run.summary, *(test for test in run.tests if test.get("tta") is not True)]
    several = [test for test in run.tests if test.get("tta") is True]
    found = {}
    for key, name in names.items():
        for suffix, sources in (("", plain), ("_ms", several)):
            values = [value for source in sources if (value := number(source, "metrics", name)) is not None]
            if values and values[-1] >= 0:  # COCO's -1: there is no object of that size
                found[f"{key}{suffix}"] = factor * values[-1]
    roots = (dig(run.config, f"{split}_dataloader", "dataset", "data_root") for split in ("val", "test", "train"))
    return {
        "data": text(told, "data") or next((known for root in roots if (known := data_name(root))), None),
        "model": text(told, "model") or text(run.config, "model", "type"),
        "backbone_type": text(told, "backbone_type") or text(run.config, "model", "backbone", "type"),
        "config": text(told, "config"),
        "num_val": number(told, "num_val"),
        "max_iters": number(run.summary, "num_steps") or number(told, "max_iters"),
        "seed": _whole(number(told, "seed") if "seed" in told else number(run.config, "randomness", "seed")),
        **found,
    }


def _features(run: Run) -> dict[str, Any]:
    return {"data": data_name(dig(run.summary, "data")), "feature": text(run.summary, "feature")}


def _whole(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else int(value)
