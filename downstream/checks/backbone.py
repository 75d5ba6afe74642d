"""Checks a config against the backbone file that it starts from: network, image size, channels, normalization."""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config

from downstream.backbones.timm_features import TimmFeatures, differences
from mae_et.errors import ConfigError
from mae_et.models.sizes import as_size, recorded_size, size_text
from mae_et.storage.metadata import stored_range

_COLOUR_STEPS = ("PhotoMetricDistortion", "ColorTransform", "RandAugment", "AutoAugment")
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")

log = logging.getLogger(__name__)


def check_backbone(config: Config, weights: Mapping[str, Any]) -> None:
    """Compares the network and the normalization of the training that a backbone file comes from with those of a config.

    Args:
        config: of a detector or segmentor.
        weights: fields of `mae_et.runs.records.InitialWeights`. timm's and official files record nothing to compare.
    Raises:
        ConfigError: naming all differences, with the --cfg-options that remove them.
    """
    metadata, file = weights.get("metadata") or {}, weights["file"]
    backbone = config.model.get("backbone") or {}
    faults: list[str] = []
    fixes: dict[str, Any] = {}
    if _kind(backbone) == TimmFeatures.__name__:
        for one in differences(backbone, metadata):
            faults.append(f"{one}, by {file}")
            if one.wanted is not None:
                fixes[f"model.backbone.{one.key}"] = one.wanted
    _compare_normalization(config, metadata, file, faults, fixes)
    if faults:
        words = " ".join(shlex.quote(f"{key}={value}".replace(" ", "")) for key, value in fixes.items())
        hint = [f"to fix all that an option can fix, add: --cfg-options {words}"] if fixes else []
        raise ConfigError([*faults, *hint], str(config.filename or "config"))
    ours = backbone.get("img_size")
    if ours is not None and "image_size" in metadata and (size := recorded_size(metadata)) != as_size(ours):
        log.info(
            "%s was pre-trained at %s px, this config uses %s px: the position table is resampled", file, size_text(size),
            size_text(as_size(ours)),
        )  # fmt: skip


def _compare_normalization(
    config: Config, metadata: Mapping[str, str], file: str, faults: list[str], fixes: dict[str, Any]
) -> None:
    """Adds the differences of the images to `faults`, and dotted key -> value of what removes them to `fixes`."""
    ours = config.model.get("data_preprocessor") or config.get("data_preprocessor") or {}
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
            faults.append(f"model.data_preprocessor.{name} = {found}, but {file} was pre-trained with {wanted}")
            fixes[f"model.data_preprocessor.{name}"] = wanted
    if num_channels == 3 and not ours.get("bgr_to_rgb"):
        faults.append(f"model.data_preprocessor.bgr_to_rgb is off, but {file} was pre-trained on RGB")
        fixes["model.data_preprocessor.bgr_to_rgb"] = True
    value_range = stored_range(metadata)
    options: dict[str, Any] = {}
    images = "grey images"
    if value_range is not None or num_channels not in (None, 1, 3):
        options, images = _for_arrays(config, num_channels or 3, value_range), f"arrays of {num_channels} channels"
        faults += [
            f"{place} changes colours of 8-bit images, but {file} was pre-trained on {images}: remove it"
            for place, step in _loaded_steps(config)
            if _kind(step) in _COLOUR_STEPS
        ]
    elif num_channels == 1:
        options = _for_grey_images(config)
    for key, value in options.items():
        found = _get(config, key)
        if key not in fixes and (list(found) if isinstance(found, tuple) else found) != value:
            faults.append(f"{key} = {found}, but {file} was pre-trained on {images}")
            fixes[key] = value


def _for_grey_images(config: Config) -> dict[str, Any]:
    """Returns dotted key -> value of what images of one channel need."""
    wanted: dict[str, Any] = {"model.backbone.in_channels": 1, "model.data_preprocessor.bgr_to_rgb": False}
    for place, step in _loaded_steps(config):
        if _kind(step) == "LoadImageFromFile":
            wanted[f"{place}.color_type"] = "grayscale"
        value = step.get("pad_val")
        image_value = value.get("img") if isinstance(value, Mapping) else value
        if isinstance(image_value, (list, tuple)):
            wanted[f"{place}.pad_val" + (".img" if isinstance(value, Mapping) else "")] = image_value[0]
    return wanted


def _for_arrays(config: Config, num_channels: int, value_range: tuple[float, float] | None) -> dict[str, Any]:
    """Returns dotted key -> value of what images need that only `LoadImageArray` loads."""
    wanted: dict[str, Any] = {
        "model.backbone.in_channels": num_channels,
        "model.data_preprocessor.bgr_to_rgb": num_channels == 3,
    }
    for place, step in _loaded_steps(config):
        if _kind(step) in ("LoadImageFromFile", "LoadImageArray"):
            wanted |= {f"{place}.type": "LoadImageArray", f"{place}.num_channels": num_channels}
            if value_range is not None:
                wanted[f"{place}.value_range"] = list(value_range)
    wanted["default_hooks.visualization.draw"] = False  # it draws the file as mmcv reads it
    return wanted


def _loaded_steps(config: Config) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for loader in LOADERS:
        yield from _steps((config.get(loader) or {}).get("dataset"), f"{loader}.dataset")


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


def _get(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        if isinstance(node, (list, tuple)):
            node = node[int(part)]
        else:
            node = node.get(part)
    return node


def _kind(node: Mapping[str, Any]) -> str:
    return str(node.get("type")).rpartition(".")[2]
