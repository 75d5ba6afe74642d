"""What in a config would end in silence or hours later: overrides without effect, normalisation, classes, annotations."""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from downstream.checks.coco import check_coco
from mae_et.errors import ConfigError

# What the runner and our tools read of a config; other names of a file are its own variables.
READ = {
    *inspect.signature(Runner.__init__).parameters,
    "custom_imports", "tta_model", "tta_pipeline", "activation_checkpointing", "efficient_conv_bn_eval", "compile",
    "model_wrapper_cfg",
} - {"self", "cfg"}  # fmt: skip
ADE20K = 150  # classes


def check_overrides(config: Config, overrides: Mapping[str, Any]) -> None:
    """Makes sure that each override is of something that is read.

    Raises:
        ConfigError: naming those that would change nothing.
    """
    faults = []
    for key in overrides:
        name = key.split(".")[0]
        if name in READ:
            continue
        if name in config:
            faults.append(
                f"{key}: {name!r} is a variable within the file, which was read before: set what was made of it, e.g. "
                "train_dataloader.dataset.data_root, or write a config with this one as its _base_"
            )
        else:
            close = difflib.get_close_matches(name, sorted(READ), 1)
            faults.append(f"{key}: unknown key {name!r}{f', did you mean {close[0]!r}?' if close else ''}")
    if faults:
        raise ConfigError(faults, "--cfg-options")


def check_normalisation(config: Config, backbone: Mapping[str, Any]) -> None:
    """Compares how images were normalised in pre-training with the config's data_preprocessor.

    Args:
        config: of a detector or segmentor.
        backbone: as from `downstream.summary.provenance`; timm's and official files do not say how.
    Raises:
        ConfigError: naming both, and the overrides that mend it.
    """
    metadata = backbone.get("metadata") or {}
    ours = config.model.get("data_preprocessor") or config.get("data_preprocessor") or {}
    faults = []
    for name in ("mean", "std"):
        theirs = json.loads(metadata.get(name, "null"))
        if theirs is None:
            continue
        wanted = [round(255 * value, 3) for value in theirs]
        found = list(ours.get(name) or [])
        if len(found) != len(wanted) or not all(
            math.isclose(a, b, abs_tol=0.3) for a, b in zip(found, wanted, strict=True)
        ):
            faults.append(
                f"{name} = {found}, but {backbone['file']} was pre-trained with {wanted}: "
                f"--cfg-options model.data_preprocessor.{name}={','.join(map(str, wanted))}"
            )
    if metadata.get("mean") and len(json.loads(metadata["mean"])) == 3 and not ours.get("bgr_to_rgb"):
        faults.append(f"bgr_to_rgb is off, but {backbone['file']} was pre-trained on RGB: set it to True")
    if faults:
        raise ConfigError(faults, "model.data_preprocessor")


def check_data(config: Config, loaders: Sequence[str]) -> None:
    """Checks the data sets of a config as far as can be done before they are read.

    Args:
        config: of a detector or segmentor.
        loaders: which, e.g. "train_dataloader".
    Raises:
        DataError: if COCO annotations do not fit their images or classes.
        ConfigError: if classes and heads, or the annotations of data set and metric, differ.
    """
    heads = dict(_num_classes(config.model.get("module") or config.model, "model"))
    for loader in loaders:
        for dataset in _datasets((config.get(loader) or {}).get("dataset")):
            kind = str(dataset.get("type")).rpartition(".")[2]
            if kind == "CocoDataset":
                _check_coco(config, loader, dataset, heads)
            elif kind in ("ClassesFileDataset", "ADE20KDataset"):
                own = (dataset.get("metainfo") or {}).get("classes")
                _compare(heads, len(own) if own else dataset.get("num_classes", ADE20K), f"{loader}.dataset")


def _check_coco(config: Config, loader: str, dataset: Mapping[str, Any], heads: Mapping[str, int]) -> None:
    from mmdet.datasets import CocoDataset

    root = Path(dataset.get("data_root") or "")
    classes = (dataset.get("metainfo") or {}).get("classes") or CocoDataset.METAINFO["classes"]
    classes = [classes] if isinstance(classes, str) else list(classes)
    annotations = root / dataset["ann_file"]
    images = root / (dataset.get("data_prefix") or {}).get("img", "")
    check_coco(annotations, images, classes, bool((dataset.get("filter_cfg") or {}).get("filter_empty_gt")))
    _compare(heads, len(classes), f"{loader}.dataset.metainfo")
    evaluator = config.get(loader.replace("dataloader", "evaluator"))
    for metric in evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]:
        read = (metric or {}).get("ann_file")
        if loader != "train_dataloader" and read and Path(read).resolve() != annotations.resolve():
            name = loader.replace("dataloader", "evaluator")
            raise ConfigError(
                [f"{name}.ann_file = {read}, but the images are those of {annotations}: set both alike"], loader
            )


def _compare(heads: Mapping[str, int], num_classes: int, where: str) -> None:
    faults = [
        f"{head}.num_classes = {number}, but {where} has {num_classes} classes: set both alike"
        for head, number in heads.items()
        if number != num_classes
    ]
    if faults:
        raise ConfigError(faults, "classes")


def _num_classes(node: Any, name: str) -> Iterator[tuple[str, int]]:
    """Finds the heads of a model that say how many classes they tell apart."""
    if isinstance(node, Mapping):
        if "num_classes" in node and "head" in name:
            yield name, node["num_classes"]
        for key, value in node.items():
            yield from _num_classes(value, f"{name}.{key}")
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _num_classes(value, f"{name}.{index}")


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
