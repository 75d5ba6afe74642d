"""Config files in the mmengine style: `_base_`, environment variables, `--cfg-options`. The only importer of mmengine."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mmengine.config import Config, DictAction

from mae_et.config.schema import from_dict, to_dict
from mae_et.errors import ConfigError

T = TypeVar("T")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds CONFIG and --cfg-options, as in the OpenMMLab tools."""
    parser.add_argument("config", metavar="CONFIG", help="config file, e.g. configs/pretrain/demo.py")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        default={},
        metavar="KEY=VALUE",
        help="override config keys, e.g. data.train=/data/photos batch.micro_batch_size=64",
    )


def load_config(cls: type[T], path: str | Path, overrides: Mapping[str, Any] | None = None) -> T:
    """Reads a config file, merges overrides and checks all of it.

    Args:
        cls: the dataclass to build, e.g. PretrainConfig.
        path: a Python config; `{{$NAME:default}}` in it reads the environment.
        overrides: dotted keys and values, as from --cfg-options.
    Raises:
        ConfigError: if the file is missing or no valid config, or with all faults of its values.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError([f"no such file: {path}"], str(path))
    try:
        config = Config.fromfile(str(path))
        values: dict[str, Any] = config.to_dict()
    except Exception as error:  # mmengine runs the file as Python: anything can come out of it
        raise ConfigError([f"cannot be read: {type(error).__name__}: {error}"], str(path)) from error
    for key, value in (overrides or {}).items():
        _override(values, key, value, str(path))
    return from_dict(cls, values, str(path))


def save_config(config: Any, path: str | Path, header: str) -> None:
    """Writes the resolved config as a config file that `load_config` reads back.

    Args:
        config: one of the dataclasses of config.py.
        path: where to write it.
        header: what the file is, for its docstring.
    """
    text = Config(to_dict(config)).pretty_text
    Path(path).write_text(f'"""{header}"""\n\n{text}')


def _override(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Sets a dotted key in nested dicts and lists; unknown keys are left for from_dict to report."""
    node: Any = values
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]
        elif isinstance(node, dict):
            node = node.setdefault(parent, {})
        else:
            raise ConfigError([f"--cfg-options {key}: {parent!r} cannot be reached: its parent is {node!r}"], where)
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError([f"--cfg-options {key}: its parent is {node!r}, which has no {last!r}"], where)
