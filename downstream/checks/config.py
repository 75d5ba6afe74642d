"""Checks a config against its data and its backbone: normalisation, classes, annotations, masks."""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from downstream.checks.coco import inspect_coco
from downstream.checks.findings import Findings, report
from downstream.checks.headers import turns_upright
from downstream.checks.masks import inspect_masks
from downstream.datasets.layout import IGNORED, mask_options, pair_files, read_classes
from mae_et.errors import ConfigError

ADE20K = 150  # classes
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")

log = logging.getLogger(__name__)


def check_normalisation(config: Config, backbone: Mapping[str, Any]) -> None:
    """Compares how images were normalised in pre-training with the config's data_preprocessor.

    Args:
        config: of a detector or segmentor.
        backbone: from `downstream.summary.provenance`; timm's and official files do not give a normalisation.
    Raises:
        ConfigError: naming both, with the --cfg-options that make them equal.
    """
    metadata = backbone.get("metadata") or {}
    ours = config.model.get("data_preprocessor") or config.get("data_preprocessor") or {}
    faults: list[str] = []
    fixes: dict[str, Any] = {}
    num_channels = None
    for name in ("mean", "std"):
        theirs = json.loads(metadata.get(name, "null"))
        if theirs is None:
            continue
        wanted = [round(255 * value, 3) for value in theirs]
        num_channels = len(wanted)
        found = list(ours.get(name) or [])
        if len(found) != len(wanted) or not all(
            math.isclose(a, b, abs_tol=0.3) for a, b in zip(found, wanted, strict=True)
        ):
            faults.append(f"{name} = {found}, but {backbone['file']} was pre-trained with {wanted}")
            fixes[f"model.data_preprocessor.{name}"] = wanted
    if num_channels == 3 and not ours.get("bgr_to_rgb"):
        faults.append(f"bgr_to_rgb is off, but {backbone['file']} was pre-trained on RGB")
        fixes["model.data_preprocessor.bgr_to_rgb"] = True
    if num_channels == 1:
        for key, value in _for_grey_images(config).items():
            if _get(config, key) != value:
                faults.append(f"{key} = {_get(config, key)}, but {backbone['file']} was pre-trained on grey images")
                fixes[key] = value
    if faults:
        words = " ".join(shlex.quote(f"{key}={value}".replace(" ", "")) for key, value in fixes.items())
        raise ConfigError([*faults, f"to fix all of these, add: --cfg-options {words}"], "model.data_preprocessor")
    size, ours = metadata.get("image_size"), (config.model.get("backbone") or {}).get("img_size")
    if size is not None and ours is not None and ours != int(size):
        log.info(
            "%s was pre-trained at %s px, this config uses %s px: the position table is resampled",
            backbone["file"], size, ours,
        )  # fmt: skip


def _for_grey_images(config: Config) -> dict[str, Any]:
    """Returns dotted key -> value of what images of one channel need."""
    wanted: dict[str, Any] = {"model.backbone.in_channels": 1, "model.data_preprocessor.bgr_to_rgb": False}
    for loader in LOADERS:
        for place, step in _steps((config.get(loader) or {}).get("dataset"), f"{loader}.dataset"):
            if _kind(step) == "LoadImageFromFile":
                wanted[f"{place}.color_type"] = "grayscale"
            value = step.get("pad_val")
            image_value = value.get("img") if isinstance(value, Mapping) else value
            if isinstance(image_value, (list, tuple)):
                wanted[f"{place}.pad_val" + (".img" if isinstance(value, Mapping) else "")] = image_value[0]
    return wanted


def check_data(config: Config, loaders: Sequence[str]) -> dict[str, list[dict[str, str]]]:
    """Inspects the data sets of a config before anything is built.

    Args:
        config: of a detector or segmentor.
        loaders: which, e.g. "train_dataloader".
    Returns:
        The findings of each data set, for summary.json.
    Raises:
        DataError: with all errors in annotations, images and masks.
        ConfigError: if classes and heads, or the annotations of data set and metric, differ.
    """
    heads = dict(num_classes_of_heads(config.model.get("module") or config.model, "model"))
    findings: dict[str, Findings] = {}
    for loader in loaders:
        for dataset in _datasets((config.get(loader) or {}).get("dataset")):
            kind = _kind(dataset)
            if kind in ("CocoDataset", "CocoDatasetByNames"):
                found = _inspect_coco(config, loader, dataset, heads)
            elif kind in ("ClassesFileDataset", "ADE20KDataset", "BaseSegDataset"):
                found = _inspect_masks(loader, dataset, heads)
            else:
                found = Findings(f"{loader} ({kind})", warnings=[f"the files of a {kind} are not inspected"])
            findings[f"{loader} {found.where}"] = found
    return report(findings.values())


def _inspect_coco(config: Config, loader: str, dataset: Mapping[str, Any], heads: Mapping[str, int]) -> Findings:
    from mmdet.datasets import CocoDataset

    root = Path(dataset.get("data_root") or "")
    classes = (dataset.get("metainfo") or {}).get("classes") or CocoDataset.METAINFO["classes"]
    classes = [classes] if isinstance(classes, str) else list(classes)
    annotations = root / dataset["ann_file"]
    images = root / (dataset.get("data_prefix") or {}).get("img", "")
    pipeline = dataset.get("pipeline") or []
    metrics = _metrics(config, loader)
    is_training = loader == "train_dataloader"
    if is_training:
        needs_masks = any(step.get("with_mask") for step in pipeline)
    else:
        needs_masks = any("segm" in _as_list(metric.get("metric", "bbox")) for metric in metrics)
    applied = (dataset.get("filter_cfg") or {}) if not dataset.get("test_mode") else {}
    findings = inspect_coco(
        annotations,
        images,
        classes,
        is_scored=not is_training and any(not metric.get("format_only") for metric in metrics),
        drops_empty=bool(applied.get("filter_empty_gt")),
        min_size=applied.get("min_size", 0),
        needs_masks=needs_masks,
        reads_runs=not is_training or all(step.get("poly2mask", True) for step in pipeline),
        is_turned=turns_upright(pipeline),
    )
    _compare(heads, len(classes), f"{loader}.dataset.metainfo")
    for metric in metrics:
        read = metric.get("ann_file")
        if not is_training and read and Path(read).resolve() != annotations.resolve():
            name = loader.replace("dataloader", "evaluator")
            raise ConfigError(
                [f"{name}.ann_file = {read}, but the images are those of {annotations}. Set both to one file"], loader
            )
    return findings


def _inspect_masks(loader: str, dataset: Mapping[str, Any], heads: Mapping[str, int]) -> Findings:
    kind, is_training = _kind(dataset), loader == "train_dataloader"
    images, masks, stems = mask_options(dataset)
    suffixes = ("", "")
    if kind == "ClassesFileDataset":
        listed = read_classes(Path(dataset["data_root"]) / "classes.json")
        classes, labels = listed.names, dict(listed.labels)
        num_classes = dataset.get("num_classes", len(classes))
    else:
        classes = tuple((dataset.get("metainfo") or {}).get("classes") or ())
        num_classes = len(classes) or ADE20K
        classes = classes or tuple(f"class {number}" for number in range(num_classes))
        first = int(dataset.get("reduce_zero_label", kind == "ADE20KDataset"))
        labels = {IGNORED: IGNORED, **({0: IGNORED} if first else {})}
        labels.update({label + first: label for label in range(num_classes)})
        suffixes = (dataset.get("img_suffix", ".jpg"), dataset.get("seg_map_suffix", ".png"))
        if kind == "ADE20KDataset" and num_classes != ADE20K:
            labels = {}  # a subset, for which mmseg has a map of its own
    _compare(heads, num_classes, f"{loader}.dataset")
    return inspect_masks(
        pair_files(images, masks, stems, *suffixes),
        str(images),
        labels or None,
        classes,
        turns_upright(dataset.get("pipeline") or []),
        is_training,
    )


def _compare(heads: Mapping[str, int], num_classes: int, where: str) -> None:
    faults = [
        f"{head}.num_classes = {number}, but {where} has {num_classes} classes. Set both to one number"
        for head, number in heads.items()
        if number != num_classes
    ]
    if faults:
        raise ConfigError(faults, "classes")


def num_classes_of_heads(node: Any, name: str) -> Iterator[tuple[str, int]]:
    """Finds the heads of a model that have a number of classes: dotted name, number."""
    if isinstance(node, Mapping):
        if "num_classes" in node and "head" in name:
            yield name, node["num_classes"]
        for key, value in node.items():
            yield from num_classes_of_heads(value, f"{name}.{key}")
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from num_classes_of_heads(value, f"{name}.{index}")


def _datasets(options: Any) -> Iterator[Mapping[str, Any]]:
    """Finds the data sets within RepeatDataset, ConcatDataset and the like."""
    if options is None:
        return
    inner = [options["dataset"]] if "dataset" in options else options.get("datasets")
    if inner is None:
        yield options
    else:
        for one in inner:
            yield from _datasets(one)


def _steps(node: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Finds the steps of all pipelines below a data set, with their dotted places."""
    if isinstance(node, Mapping):
        if "type" in node:
            yield place, node
        for key, value in node.items():
            yield from _steps(value, f"{place}.{key}")
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _steps(value, f"{place}.{index}")


def _metrics(config: Config, loader: str) -> list[Mapping[str, Any]]:
    return [metric for metric in _as_list(config.get(loader.replace("dataloader", "evaluator"))) if metric]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _kind(node: Mapping[str, Any]) -> str:
    return str(node.get("type")).rpartition(".")[2]


def _get(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        if isinstance(node, (list, tuple)):
            node = node[int(part)]
        else:
            node = node.get(part)
    return node
