"""Config files in the mmengine style: `_base_`, environment variables, `--cfg-options`. The only importer of mmengine."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mmengine.config import Config

from mae_et.config.overrides import KeyValueAction, apply_overrides
from mae_et.config.section import Section
from mae_et.config.validation import from_dict, to_dict
from mae_et.errors import ConfigError

S = TypeVar("S", bound=Section)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds CONFIG and --cfg-options, as in the OpenMMLab tools."""
    parser.add_argument("config", metavar="CONFIG", help="config file, e.g. configs/pretrain/demo.py")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=KeyValueAction,
        default={},
        metavar="KEY=VALUE",
        help="override config keys, e.g. data.train=/data/photos batch.micro_batch_size=64; quote values with spaces",
    )


def load_config(cls: type[S], path: str | Path, overrides: Mapping[str, Any] | None = None) -> S:
    """Reads a config file, merges overrides and checks all of it.

    Args:
        cls: the config class, e.g. PretrainConfig.
        path: a Python config; `{{$NAME:default}}` in it reads the environment.
        overrides: dotted keys and values; text, as from --cfg-options, is read by the type of its key.
    Raises:
        ConfigError: if the file is missing or not a valid config, or with all faults of its values.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError([_missing(path)], str(path))
    try:
        values: dict[str, Any] = Config.fromfile(str(path)).to_dict()
    except Exception as error:  # mmengine runs the file as Python: anything can come out of it
        raise ConfigError([f"cannot be read: {type(error).__name__}: {error}"], str(path)) from error
    apply_overrides(cls, values, overrides or {}, str(path))
    return from_dict(cls, values, str(path))


def save_config(config: Section, path: str | Path, header: str) -> None:
    """Writes the resolved config as a config file that `load_config` reads back.

    Args:
        config: a training config.
        path: where to write it.
        header: what the file is, for its docstring.
    """
    text = Config(to_dict(config)).pretty_text
    Path(path).write_text(f'"""{header}"""\n\n{text}')


def _missing(path: Path) -> str:
    """Returns a message for a path that is not a file: what is there instead, or what has a similar name."""
    if path.is_dir():
        configs = sorted(str(config) for config in path.glob("*.py"))
        holds = f"one of its files: {_some(configs)}" if configs else "a Python config, e.g. configs/pretrain/demo.py"
        return f"is a folder, not a config file; give {holds}"
    by_name = {config.name: str(config) for config in (*Path("configs").glob("**/*.py"), *path.parent.glob("*.py"))}
    near = [by_name[name] for name in difflib.get_close_matches(path.with_suffix(".py").name, by_name, n=3)]
    hint = f"; did you mean {_some(near)}?" if near else "; run from the root of the repository, or give the full path"
    return f"no such file: {path.absolute()} (the current folder is {Path.cwd()}){hint}"


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
