"""Config files in the mmengine style: `_base_`, environment variables, `--cfg-options`. The only importer of mmengine."""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmengine.config import Config
from mmengine.config import config as mmengine_config

from mae_et.config.overrides import KeyValueAction, apply_overrides
from mae_et.config.section import Section
from mae_et.config.shipped import find_config
from mae_et.config.validation import from_dict, to_dict
from mae_et.errors import ConfigError, UserError

if TYPE_CHECKING:
    from mae_et.config.dense_probe import DenseProbeConfig
    from mae_et.config.schema import ClassifyConfig

log = logging.getLogger(__name__)

S = TypeVar("S", bound=Section)
P = TypeVar("P", "ClassifyConfig", "DenseProbeConfig")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds CONFIG and --cfg-options, as in the OpenMMLab tools."""
    parser.add_argument(
        "config", metavar="CONFIG", help="name of a shipped config (a wrong name lists them), or a config file"
    )
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
        path: a Python config, or the name of a shipped one, as for `find_config`; `{{$NAME:default}}` in the file reads
            the environment.
        overrides: dotted keys and values; text, as from --cfg-options, is read by the type of its key.
    Raises:
        ConfigError: if the file is missing or not a valid config, or with all faults of its values.
    """
    path = find_config(path, (cls.folder,))
    values, overrides = read_file(path), dict(overrides or {})
    _insert_curriculum(values, overrides.pop("curriculum.file", None), str(path))
    apply_overrides(cls, values, overrides, str(path))
    return from_dict(cls, values, str(path))


def load_probe_config(cls: type[P], args: argparse.Namespace) -> P:
    """Reads the config of a command that judges a backbone: CONFIG, --cfg-options and --backbone.

    Raises:
        ConfigError: as `load_config`.
        UserError: if neither the config nor the command line names a backbone or "random".
    """
    overrides = dict(args.cfg_options)
    if args.backbone is not None:
        overrides["backbone"] = None if args.backbone == "random" else args.backbone
    config = load_config(cls, args.config, overrides)
    if config.backbone is None and args.backbone is None:
        raise UserError("no backbone: give --backbone FILE, or --backbone random for untrained weights")
    return config


def read_file(path: Path) -> dict[str, Any]:
    """Reads a config file with its bases into nested dicts, unchecked.

    Raises:
        ConfigError: if it is not a valid config file.
    """
    print_log, mmengine_config.print_log = mmengine_config.print_log, _say
    try:
        values: dict[str, Any] = Config.fromfile(str(path)).to_dict()
    except Exception as error:  # mmengine runs the file as Python: anything can come out of it
        raise ConfigError([f"cannot be read: {type(error).__name__}: {error}"], str(path)) from error
    finally:
        mmengine_config.print_log = print_log
    return values


@functools.cache
def _say(message: str, logger: object = None, level: int = logging.INFO) -> None:
    """Takes the place of mmengine's print_log, whose logger imports torch: logs a message once, in our format."""
    log.log(level, "config: %s", message)


def _insert_curriculum(values: dict[str, Any], file: Any, where: str) -> None:
    """Replaces the keys of the section `curriculum` by those of `curriculum.file`, in place.

    Args:
        values: of the config.
        file: from the command line; None: that of the config, if any.
        where: the config, for messages.
    Raises:
        ConfigError: if the file is missing, or holds something else than the section.
    """
    section = values.get("curriculum")
    own = section.pop("file", None) if isinstance(section, dict) else None
    file = own if file is None else file
    if file in (None, "None"):
        return
    fix = "give a curriculum.py that `mae-et search` wrote"
    try:
        found = read_file(Path(file))
    except ConfigError as error:
        raise ConfigError([f"curriculum.file = {str(file)!r} {error.faults[0]}: {fix}"], where) from error
    if set(found) != {"curriculum"} or not isinstance(found["curriculum"], dict):
        raise ConfigError([f"curriculum.file = {str(file)!r} holds {', '.join(found) or 'nothing'}: {fix}"], where)
    values["curriculum"] = {**(section or {}), **found["curriculum"]}


def save_config(config: Section, path: str | Path, header: str) -> None:
    """Writes the resolved config as a config file that `load_config` reads back.

    Args:
        config: a training config.
        path: where to write it.
        header: what the file is, for its docstring.
    """
    text = Config(to_dict(config)).pretty_text
    Path(path).write_text(f'"""{header}"""\n\n{text}')
