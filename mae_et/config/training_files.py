"""Config files of trainings under the curriculum: pre-training and supervised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_et.config.files import load_config, read_file
from mae_et.config.schema import PretrainConfig
from mae_et.config.shipped import find_config
from mae_et.config.supervised import SupervisedConfig


def load_training_config(
    path: str | Path, overrides: Mapping[str, Any] | None = None
) -> PretrainConfig | SupervisedConfig:
    """Reads a config of a training under the curriculum, as `load_config` does.

    A config that names a timm model (`model.name`) is a supervised one.

    Args:
        path: a Python config, or the name of a shipped one.
        overrides: dotted keys and values.
    Raises:
        ConfigError: as `load_config`.
    """
    path = find_config(path, (PretrainConfig.folder, SupervisedConfig.folder))
    if "name" in (read_file(path).get("model") or {}):
        return load_config(SupervisedConfig, path, overrides)
    return load_config(PretrainConfig, path, overrides)
