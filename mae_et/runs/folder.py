"""Opens or resumes the folder of a run. The same for pre-training and classification."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import mae_et
from mae_et.config.files import save_config
from mae_et.config.schema import changed_keys, from_dict, resume_free, to_dict
from mae_et.curriculum.plan import Plan
from mae_et.data.sources.source import ImageSource
from mae_et.engine.distributed import World
from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.runs.provenance import describe_environment
from mae_et.runs.records import write_record
from mae_et.storage.checkpoint import atomic_path, list_checkpoints, load_newest

log = logging.getLogger(__name__)


def open_run(
    config: Any,
    kind: str,
    work_dir: Path,
    resume: bool,
    source: ImageSource,
    plan: Plan,
    world: World,
    metadata: Mapping[str, str],
    weights: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Makes or reopens the folder of a run and writes config.py, plan.json and environment.json into it.

    Args:
        config: a dataclass of config.py.
        kind: "pretrain" or "classify".
        work_dir: the folder.
        resume: go on from its newest whole checkpoint.
        source: the training images.
        plan: of this run.
        world: this process among the others.
        metadata: what a backbone exported from a checkpoint of this run says about itself.
        weights: a digest of the weights that the run starts from, where another file would make it another run.
    Returns:
        What each checkpoint has to hold to be recognised, and the checkpoint to resume from (None: from the start).
    Raises:
        UserError: if the folder holds a run and resume is off.
        CheckpointError: if there is nothing to resume, or it was another run, naming what differs.
    """
    identity = {
        "kind": kind,
        "config": to_dict(config),
        "metadata": dict(metadata),
        "data_fingerprint": _fingerprint(source),
        "dataset_size": len(source),
        "num_steps": plan.num_steps,
        "version": mae_et.__version__,
        "initial_weights": weights,
    }
    state = _find_state(work_dir, resume, identity, type(config))
    # Every process has looked before the main one writes.
    steps = world.gather(None if state is None else state["progress"]["step"])
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the processes found checkpoints of different steps ({steps}) in {work_dir}: --work-dir must be on a disk that "
            "all machines share"
        )
    if world.is_main:
        make_work_dir(config, work_dir, world)
        _clean(work_dir, keep_metrics=state is not None)
        write_json(work_dir / "plan.json", plan.to_dict())
    return identity, state


def make_work_dir(config: Any, work_dir: Path, world: World) -> None:
    """Makes the folder and writes config.py and environment.json into it."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with atomic_path(work_dir / "config.py") as temporary:
        save_config(config, temporary, "The resolved config of this run.")
    write_record(work_dir / "environment.json", describe_environment(world.device.type, world.size))


def describe_model(model: nn.Module) -> str:
    """Returns the model's class and size in words."""
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"


def spread(num: int, most: int) -> np.ndarray:
    """Returns at most `most` indices, evenly spread over range(num)."""
    return np.unique(np.linspace(0, num - 1, min(num, most)).round().astype(np.int64))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")


def _find_state(work_dir: Path, resume: bool, identity: Mapping[str, Any], kind: type) -> dict[str, Any] | None:
    """Returns the checkpoint to resume from, if there is one; refuses what must not be overwritten."""
    checkpoints = work_dir / "checkpoints"
    if not resume:
        if list_checkpoints(checkpoints):
            raise UserError(f"{work_dir} holds a run already: --resume goes on with it; or choose another --work-dir")
        return None
    if not work_dir.is_dir():
        raise CheckpointError(f"no run to resume: {work_dir} does not exist; start without --resume")
    if not list_checkpoints(checkpoints):
        log.warning("%s holds no checkpoint yet: starting from the first step", work_dir)
        return None
    path, state = load_newest(checkpoints, log.warning)
    if state.get("kind") != identity["kind"]:
        raise CheckpointError(f"{path} is not from a {identity['kind']} run: name another --work-dir")
    try:
        before = to_dict(from_dict(kind, state["config"]))  # a key that is younger than the checkpoint had its default
    except ConfigError as error:
        raise CheckpointError(
            f"{path} holds a config that this version cannot read: {'; '.join(error.faults)}. Resume with mae_et "
            f"{state.get('version', 'of its time')}"
        ) from error
    changes = changed_keys(before, identity["config"], resume_free(identity["kind"]))
    if state["data_fingerprint"] != identity["data_fingerprint"]:
        changes.append(
            f"data.train: other images ({state['dataset_size']} before, {identity['dataset_size']} now, or other names)"
        )
    if state.get("initial_weights", identity["initial_weights"]) != identity["initial_weights"]:
        changes.append("backbone: other weights")
    if changes:
        hint = " (model.init_from takes its weights)" if identity["kind"] == "pretrain" else ""
        raise CheckpointError(
            f"{path} was made with another config:\n" + "\n".join(f"  - {change}" for change in changes) + "\n"
            f"Undo these changes to resume, or start a new run in another --work-dir{hint}"
        )
    log.info("resuming from %s", path)
    return state


def _clean(work_dir: Path, keep_metrics: bool) -> None:
    """Makes the run folder and removes what an earlier start left half done."""
    (work_dir / "checkpoints").mkdir(exist_ok=True)
    for partial_file in (*work_dir.glob(".*.writing"), *work_dir.glob("checkpoints/.*.writing")):
        partial_file.unlink()
    if not keep_metrics:
        (work_dir / "metrics.jsonl").unlink(missing_ok=True)
        for events in work_dir.glob("tensorboard/events.*"):
            events.unlink()


def _fingerprint(source: ImageSource) -> list[str]:
    """Names that tell a data set from another one, wherever it lies."""
    return [Path(source.name(int(i))).name for i in spread(len(source), 64)] + [str(len(source))]
