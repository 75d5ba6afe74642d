"""Checks a config against its data: classes, annotations, masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from downstream.checks.coco import inspect_coco
from downstream.checks.findings import Findings, report
from downstream.checks.headers import turns_upright
from downstream.checks.masks import inspect_masks
from mae_et.data.mask_files import IGNORED, mask_options, pair_files, read_classes
from mae_et.errors import ConfigError

ADE20K = 150  # classes


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
    images, masks, stems, *suffixes = mask_options(dataset)
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
        suffixes = [dataset.get("img_suffix", ".jpg"), dataset.get("seg_map_suffix", ".png")]
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


def _metrics(config: Config, loader: str) -> list[Mapping[str, Any]]:
    return [metric for metric in _as_list(config.get(loader.replace("dataloader", "evaluator"))) if metric]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _kind(node: Mapping[str, Any]) -> str:
    return str(node.get("type")).rpartition(".")[2]
