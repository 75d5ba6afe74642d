"""Trained detectors and segmentors: the model of a checkpoint, and how its images are prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from downstream.backbones.loading import load_checkpoint
from mae_et.errors import CheckpointError, ConfigError

ARRAYS = "LoadImageArray"


def build_model(config: Config, checkpoint: str | Path, device: torch.device) -> tuple[Any, list[str]]:
    """Builds the model of a config, loads a checkpoint strictly, and returns it in eval mode with the names of its classes.

    Raises:
        CheckpointError: if the checkpoint is missing, does not fit the config, or has no class names.
    """
    if not Path(checkpoint).is_file():
        raise CheckpointError(f"no such checkpoint: {checkpoint}")
    init_default_scope(config.default_scope)
    config.model.get("module", config.model).backbone["init_cfg"] = None  # the checkpoint has all weights
    model: Any = MODELS.build(config.model)
    content = load_checkpoint(model, checkpoint)
    meta: Mapping[str, Any] = (content.get("meta") or {}).get("dataset_meta") or {}
    names = meta.get("classes") or meta.get("CLASSES")
    if not names:
        raise CheckpointError(
            f"{checkpoint} records no class names, so its outputs cannot be named: use a checkpoint that `mae-et train` wrote"
        )
    return model.to(device).eval(), [str(name) for name in names]


def test_steps(config: Config) -> list[Any]:
    """Returns the test pipeline of a config without the steps that read annotations.

    Raises:
        ConfigError: if there is no test_dataloader.
    """
    if "test_dataloader" not in config:
        raise ConfigError(["it has no test_dataloader, whose pipeline prepares the images"], str(config.filename))
    dataset = config.test_dataloader.dataset
    while "pipeline" not in dataset and "dataset" in dataset:
        dataset = dataset.dataset
    return [step for step in dataset.pipeline if "Annotations" not in str(step["type"])]


@dataclass(frozen=True)
class Preparation:
    """What a model expects of its images.

    Args:
        steps: of the test pipeline.
        num_channels: C.
        channel_order: of the model's input: "RGB", "BGR", or "as stored" for other numbers of channels.
        mean, std: C values in this order, of pixels in [0, 1].
        value_range: stored values (black, white) of images that are not 8-bit.
    """

    steps: list[Any]
    num_channels: int
    channel_order: str
    mean: list[float]
    std: list[float]
    value_range: tuple[float, float] | None


def preparation(config: Config, model: Any) -> Preparation:
    """Returns how the test pipeline and the data preprocessor of a model prepare images."""
    steps, preprocessor = test_steps(config), model.data_preprocessor
    loader: Mapping[str, Any] = steps[0] if steps else {}
    normal = getattr(preprocessor, "mean", None)
    num_channels = loader.get("num_channels") or getattr(model.backbone, "in_channels", None)
    num_channels = int(num_channels or (3 if normal is None else normal.numel()))
    mean, std = [0.0] * num_channels, [1 / 255] * num_channels  # a model without normalization takes 0 to 255
    if normal is not None:
        scaled = ((values.flatten() / 255).expand(num_channels) for values in (normal, preprocessor.std))
        mean, std = ([round(value, 7) for value in values.tolist()] for values in scaled)  # float32 has 7 digits
    order = "as stored"
    if num_channels == 3:
        is_bgr = str(loader.get("channel_order", "bgr")) == "bgr"
        order = "BGR" if is_bgr != bool(getattr(preprocessor, "_channel_conversion", False)) else "RGB"
    value_range = loader.get("value_range") if str(loader.get("type")).endswith(ARRAYS) else None
    return Preparation(
        [_plain(step) for step in steps], num_channels, order, mean, std,
        None if value_range is None else (float(value_range[0]), float(value_range[1])),
    )  # fmt: skip


def _plain(step: Any) -> Any:
    return step.to_dict() if hasattr(step, "to_dict") else step
