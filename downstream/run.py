"""From a config of mmdetection or mmsegmentation to a run: what `tools/train.py` and `tools/test.py` share.

The config stays the library's own. This module corrects what would give a wrong result or a traceback of the libraries.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.config import utils as config_utils

from downstream.backbones.loading import load_checkpoint
from downstream.backbones.timm_features import TimmFeatures
from downstream.backbones.vit_det import ViTDet
from downstream.backbones.vit_seg import ViTSeg
from downstream.checks.backbone import check_backbone
from downstream.checks.config import check_data
from downstream.checks.overrides import apply_overrides
from downstream.compat.explain import explained
from downstream.compat.machine import prepare
from downstream.compat.packages import BY_SCOPE, check_packages, faults, installed_versions, locate, own_folder
from downstream.compat.quiet import quiet_imports
from downstream.compat.runner import MessageBuffer, TransferRunner, start_buffer
from downstream.compat.trust import refuse_pickles
from downstream.hooks.batch import BatchHook, images_per_update
from downstream.hooks.finite import FiniteHook
from downstream.hooks.plain_checkpoint import PlainCheckpointHook
from downstream.hooks.seeding import StepSeedHook
from downstream.summary import SummaryHook
from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.runs.provenance import describe_weights
from mae_et.storage.weights import find_weights

refuse_pickles()  # before anything loads a checkpoint

__all__ = ["evaluate", "newest_checkpoint", "prepare", "read_config", "set_backbone", "set_start", "train"]
log = logging.getLogger(__name__)

STRICT_BACKBONES = (ViTDet, ViTSeg, TimmFeatures)
_SAVE = re.compile(r"(?:iter|epoch)_(\d+)\.pth$")


def read_config(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] | None = None) -> Config:
    """Reads a config file and merges overrides, after a check of the packages.

    Args:
        path: a Python config; `_base_ = "mmdet::..."` and "mmseg::..." name files of the installed packages. It is a
            program: mmengine runs it.
        overrides: words KEY=VALUE, as from --cfg-options, or dotted keys with values.
    Raises:
        UserError: if packages are missing or do not fit, with the commands that fix it.
        ConfigError: if the file is missing or cannot be read, or an override would have no effect.
    """
    path = Path(path)
    start_buffer()
    if path.is_dir():
        raise ConfigError([f"{path} is a folder. Give a config file"], str(path))
    if not path.is_file():
        raise ConfigError([f"no such file: {path} (looked for {path.resolve()})"], str(path))
    config_utils.MODULE2PACKAGE["mmseg"] = (
        "mmseg"  # it maps to the package before its continuation, which has another name
    )
    try:
        with quiet_imports():
            config = Config.fromfile(str(path))
    except Exception as error:  # mmengine runs the file as Python: anything can come out of it
        broken = {line for scope in BY_SCOPE for line in faults(scope, installed_versions(), locate, own_folder)}
        if broken and isinstance(error, (ImportError, FileNotFoundError, AssertionError)):
            raise UserError(
                "packages are missing or do not fit:\n" + "\n".join(f"  - {x}" for x in sorted(broken))
            ) from error
        raise ConfigError([f"cannot be read: {type(error).__name__}: {error}"], str(path)) from error
    if "model" not in config:
        raise ConfigError(["it has no 'model'. Give a config of detection or segmentation"], str(path))
    scope = config.get("default_scope", "none")
    check_packages(scope)
    with quiet_imports():
        for part in ("datasets", "models"):
            importlib.import_module(f"{scope}.{part}")
    if overrides:
        apply_overrides(config, overrides)
    return config


def set_backbone(config: Config, path: str | Path) -> None:
    """Makes the model start from a backbone, loaded strictly.

    Args:
        config: as read.
        path: a file of weights, or the folder of a run.
    Raises:
        CheckpointError: if there are no weights.
        UserError: if the backbone of the config is not one of ours, which alone load strictly, or `load_from` is set.
    """
    path = find_weights(path)
    backbone = _without_wrapper(config.model).get("backbone") or {}
    names = [cls.__name__ for cls in STRICT_BACKBONES]
    if str(backbone.get("type")).rpartition(".")[2] not in names:
        raise UserError(
            f"--backbone needs one of {', '.join(names)} as model.backbone, not {backbone.get('type')!r}: mmengine loads weights "
            "into others without an error where they do not fit"
        )
    backbone["init_cfg"] = {"type": "Pretrained", "checkpoint": str(path.resolve())}


def set_start(config: Config, resume: str | None) -> bool:
    """Sets the checkpoint that a run continues from.

    Args:
        config: with `work_dir`.
        resume: None: nothing; "auto": the newest checkpoint of the work dir, if there is one; else a checkpoint.
    Returns:
        Whether there is a checkpoint to continue from.
    Raises:
        CheckpointError: if the given checkpoint is missing.
        UserError: if nothing is to be continued and the work dir holds a run.
    """
    newest = newest_checkpoint(Path(config.work_dir))
    if resume is None:
        if newest is not None and not config.get("resume"):
            raise UserError(
                f"{config.work_dir} already holds a run ({newest.name}). Continue it with --resume, or choose another --work-dir"
            )
        return False
    found = newest if resume == "auto" else Path(resume)
    if found is None:
        log.warning("nothing to resume in %s: starting from the beginning", config.work_dir)
        return False
    if not found.is_file():
        raise CheckpointError(f"no checkpoint to resume from: {found}")
    log.info("resuming from %s", found)
    config.resume, config.load_from = True, str(found)
    backbone = _without_wrapper(config.model).get("backbone")
    if backbone is not None:
        backbone["init_cfg"] = None  # the checkpoint has all weights; the file may not exist any more
    return True


def train(config: Config) -> None:
    """Trains, and writes `summary.json` into the work dir.

    Raises:
        CheckpointError: if the backbone file or `load_from` does not fit the model, naming keys and shapes.
        DataError: if annotations, images, masks and classes do not fit each other.
        ConfigError: if a key is unknown, or the backbone is of another network or normalization.
        NonFiniteError: if a loss or gradient was NaN or infinite.
    """
    with _collected(config) as buffer:
        findings = check_data(config, ("train_dataloader", "val_dataloader"))
        weights = describe_weights(backbone_file(config))
        backbone = None if weights is None else weights.model_dump()
        if backbone is not None:
            check_backbone(config, backbone)
        notes = _check_start(config, backbone is not None)
        _add_hooks(
            config,
            *({"type": hook.__name__} for hook in (StepSeedHook, FiniteHook, BatchHook)),
            {"type": SummaryHook.__name__, "backbone": backbone, "notes": notes},
            {"type": PlainCheckpointHook.__name__},
        )
        runner: Any = TransferRunner.from_cfg(config)
        runner.findings, runner.messages = findings, buffer.messages
        scale_for_accumulation(runner)
        runner.train()


def evaluate(config: Config, checkpoint: str | Path, tta: bool = False) -> dict[str, float]:
    """Evaluates a checkpoint, and writes `test_summary.json`, with tta `test_summary_tta.json`, into the work dir.

    Args:
        config: as prepared.
        checkpoint: of a training run.
        tta: several scales and flips, by the config's `tta_model` and `tta_pipeline`.
    Returns:
        The metrics.
    Raises:
        CheckpointError: if it does not fit the model, naming keys and shapes, or would run code.
        DataError: if annotations, images, masks and classes do not fit each other.
        ConfigError: if a key is unknown, or the config has no settings for tta.
    """
    if not Path(checkpoint).is_file():
        raise CheckpointError(f"no such checkpoint: {checkpoint}")
    with _collected(config) as buffer:
        findings = check_data(config, ("test_dataloader",))
        if tta:
            if "tta_model" not in config or "tta_pipeline" not in config:
                raise ConfigError(["--tta needs tta_model and tta_pipeline"], str(config.filename))
            config.test_dataloader.dataset.pipeline = config.tta_pipeline
            config.model = ConfigDict(**config.tta_model, module=config.model)
        _add_hooks(config, {"type": SummaryHook.__name__, "tta": tta, "checkpoint": Path(checkpoint).name})
        config.load_from, config.resume = None, False
        backbone = _without_wrapper(config.model).get("backbone")
        if backbone is not None:
            backbone["init_cfg"] = None
        runner: Any = TransferRunner.from_cfg(config)
        runner.findings, runner.messages = findings, buffer.messages
        content = load_checkpoint(runner.model, checkpoint)
        runner.call_hook("after_load_checkpoint", checkpoint=content)
        return runner.test()


def backbone_file(config: Config) -> str | None:
    """Returns the file that the backbone of a config starts from; None where it starts at random."""
    backbone = _without_wrapper(config.model).get("backbone") or {}
    return (backbone.get("init_cfg") or {}).get("checkpoint")


def scale_for_accumulation(runner: Any) -> None:
    """Counts accumulated steps to the batch, which mmengine does not, and logs what another batch than the recipe's changes."""
    scaling, config = runner.auto_scale_lr, runner.cfg
    if not scaling or not scaling.get("enable"):
        return
    accumulated = config.optim_wrapper.get("accumulative_counts", 1)
    planned, batch = scaling["base_batch_size"], images_per_update(runner)
    scaling["base_batch_size"] = planned / accumulated
    if batch != planned and not config.get("resume"):  # a resumed run keeps the learning rates of its checkpoint
        log.warning(
            "batch %d, the recipe's is %d: its learning rates are multiplied by %g", batch, planned, batch / planned
        )
    per_step = batch // accumulated
    if per_step != planned and config.train_cfg.get("max_iters"):
        log.warning(
            "a step sees %d images, the recipe's %d: max_iters = %d is %g of its budget; see docs/guides/transfer.md, few GPUs",
            per_step, planned, config.train_cfg.max_iters, per_step / planned,
        )  # fmt: skip


def _check_start(config: Config, has_backbone: bool) -> list[str]:
    """Logs which weights a new run starts from, where that is not obvious; returns the notes for summary.json.

    Raises:
        CheckpointError: if the file of `load_from` is missing.
    """
    if config.get("resume"):
        return []
    if not config.get("load_from"):
        note = "no --backbone and no load_from: the backbone starts from random weights"
        notes = [] if has_backbone else [note]
    else:
        if not Path(config.load_from).is_file() and "://" not in config.load_from:
            raise CheckpointError(f"no such checkpoint: load_from = {config.load_from}")
        note = f"load_from = {config.load_from} overwrites the backbone file: leave one of them out"
        notes = [note] if has_backbone else []
    for line in notes:
        log.warning("%s", line)
    return notes


@contextlib.contextmanager
def _collected(config: Config) -> Iterator[MessageBuffer]:
    """Ends the collection of our messages with the run, and explains errors of the libraries."""
    buffer = TransferRunner.buffer or start_buffer()
    try:
        with explained(config):
            yield buffer
    finally:
        buffer.close()
        TransferRunner.buffer = None


def _add_hooks(config: Config, *hooks: dict[str, Any]) -> None:
    config.custom_hooks = [*(config.get("custom_hooks") or []), *hooks]


def newest_checkpoint(work_dir: Path) -> Path | None:
    """Returns the checkpoint that mmengine noted last; else that of the highest number, e.g. where the note was lost."""
    note = work_dir / "last_checkpoint"
    if note.is_file():  # with the path at the time, so also of a folder that was moved
        noted = work_dir / Path(note.read_text(encoding="utf-8").strip()).name
        if noted.is_file():
            return noted
    numbered = {int(match[1]): path for path in work_dir.glob("*.pth") if (match := _SAVE.match(path.name))}
    return numbered[max(numbered)] if numbered else None


def _without_wrapper(model: Any) -> Any:
    return model.module if "module" in model else model
