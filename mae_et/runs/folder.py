"""The folder of a run: locked, opened or resumed, and described."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from torch import nn

from mae_et.config.files import load_config, save_config
from mae_et.config.schema import RESUME_FREE, changed_keys, from_dict, to_dict
from mae_et.curriculum.plan import Plan
from mae_et.data.sources.source import ImageSource
from mae_et.engine.distributed import World
from mae_et.engine.loggers import forget_ids
from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.runs.provenance import describe_environment
from mae_et.runs.record_files import write_record
from mae_et.runs.records import Resolved
from mae_et.storage.atomic import atomic_path
from mae_et.storage.checkpoint import check_whole, list_checkpoints, load_newest, remove_unfinished
from mae_et.storage.sharded_checkpoint import check_sharded

log = logging.getLogger(__name__)

LOCK = ".lock"


class RunFolder:
    """The folder of a run. As a context manager it locks the folder, so that two runs never write into the same one.

    Args:
        path: the folder; it is created.
        config: of the run.
        world: this process among the others. The main process locks and writes.
    Raises:
        UserError: on entry, if another process has the lock.
    """

    def __init__(self, path: Path, config: Any, world: World) -> None:
        self.path, self.config, self.world = path, config, world
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RunFolder:
        # All processes learn whether the main one has the lock, so that all of them stop.
        fault = self._lock() if self.world.is_main else None
        if fault := self.world.gather(fault)[0]:
            raise UserError(fault)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _lock(self) -> str | None:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / LOCK, timeout=0)
        try:
            self._stack.enter_context(lock)
        except filelock.Timeout:
            return f"another run is writing into {self.path}: wait for it, stop it, or choose another --work-dir"
        handler = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("mae_et")
        logger.addHandler(handler)
        self._stack.callback(handler.close)
        self._stack.callback(logger.removeHandler, handler)
        return None

    def open(self, resume: bool, identity: Mapping[str, Any], plan: Plan, resolved: Resolved) -> dict[str, Any] | None:
        """Finds the checkpoint to resume from and writes config.py, plan.json and environment.json.

        Args:
            resume: continue from the newest whole checkpoint; start the run if there is none.
            identity: what makes a run the same run, as `identify` in tasks/run.py returns it.
            plan: of this run.
            resolved: what the run decided at its first start.
        Returns:
            The content of the checkpoint to resume from; None: start the run.
        Raises:
            UserError: if the folder holds a run and resume is off.
            CheckpointError: if the run there is another one, naming the differences.
        """
        state = self._find_state(resume, identity)
        # Every process has looked before the main one writes.
        steps = self.world.gather(None if state is None else state["progress"]["step"])
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"the processes found checkpoints of different steps ({steps}) in {self.path}: --work-dir must be on a disk "
                "that all machines share"
            )
        if self.world.is_main:
            self._clean(keep_metrics=state is not None)
            self.describe()
            write_json(self.path / "plan.json", {**plan.to_dict(), "resolved": resolved.model_dump(mode="json")})
        return state

    def describe(self) -> None:
        """Writes config.py and environment.json."""
        with atomic_path(self.path / "config.py") as temporary:
            save_config(self.config, temporary, "The resolved config of this run.")
        write_record(self.path / "environment.json", describe_environment(self.world.device.type, self.world.size))

    def check_unused(self, resume: bool) -> None:
        """Refuses the folder of another run, for a run without checkpoints.

        Args:
            resume: whether a finished run of the same config may be repeated.
        Raises:
            UserError: if the folder holds a training run, a run of another config, or a finished run and resume is off.
        """
        other = "choose another --work-dir"
        if list_checkpoints(self.path / "checkpoints"):
            raise UserError(f"{self.path} holds a training run: {other}")
        finished = (self.path / "summary.json").exists()
        if (self.path / "config.py").exists():
            try:
                before = to_dict(load_config(type(self.config), self.path / "config.py"))
            except ConfigError as error:
                raise UserError(f"{self.path} holds a run of another kind or version: {other}") from error
            if changes := changed_keys(before, to_dict(self.config)):
                raise UserError(
                    f"{self.path} holds a run with another config: {other}\n" + "\n".join(f"  - {c}" for c in changes)
                )
        elif finished:
            raise UserError(f"{self.path} holds the results of another run (summary.json): {other}")
        if finished and not resume:
            raise UserError(f"{self.path} holds a finished run: {other}, or repeat the run with --resume")

    def _find_state(self, resume: bool, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        refuse_used(self.path, resume)
        checkpoints = self.path / "checkpoints"
        if not list_checkpoints(checkpoints):
            if resume:
                log.info("%s holds no checkpoint: starting at the first step", self.path)
            return None
        path, state = load_newest(checkpoints, log.warning, self._check, self.world.gather)
        changes = changes_since(state, identity, type(self.config), path)
        if changes:
            hint = " (model.init_from takes its weights)" if identity["kind"] == "pretrain" else ""
            raise CheckpointError(
                f"{path} was made with another config:\n" + "\n".join(f"  - {change}" for change in changes) + "\n"
                f"Undo these changes to resume, or start a new run in another --work-dir{hint}"
            )
        log.info("resuming from %s", path)
        return state

    def _check(self, path: Path) -> None:
        """Checks this process's part of a checkpoint: some of its files, or a single file once on each machine."""
        if path.is_dir():
            check_sharded(path, self.world.rank, self.world.size)
        elif self.world.rank % self.world.local_size == 0:
            check_whole(path)

    def _clean(self, keep_metrics: bool) -> None:
        """Removes what an earlier start left half done."""
        for folder in (self.path, self.path / "checkpoints"):
            remove_unfinished(folder)
        if not keep_metrics:
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
            for events in self.path.glob("tensorboard/events.*"):
                events.unlink()
            forget_ids(self.path)


def refuse_used(path: Path, resume: bool) -> None:
    """Refuses a folder that a training must not write into.

    Raises:
        UserError: if it holds a run and resume is off, or results without checkpoints.
    """
    if list_checkpoints(path / "checkpoints"):
        if not resume:
            raise UserError(
                f"{path} holds a run: continue it with --resume, or choose another --work-dir for a new run"
            )
    elif (path / "summary.json").exists():
        raise UserError(f"{path} holds the results of another run (summary.json): choose another --work-dir")


def read_resolved(path: Path, world: World, needed: bool) -> Resolved | None:
    """Reads what the run of a folder decided at its first start. The main process reads for all.

    Args:
        path: the run folder.
        world: this process among the others.
        needed: whether the config leaves something to decide.
    Returns:
        None if the folder holds no checkpoint (the run starts again, and decides again), or it is not needed and not there.
    Raises:
        CheckpointError: if it is needed and there are checkpoints, but plan.json is missing or has none of it.
    """
    resolved, fault = None, None
    if world.is_main and list_checkpoints(path / "checkpoints"):
        try:
            resolved = Resolved.model_validate(json.loads((path / "plan.json").read_text())["resolved"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = needed and (
                f"{path / 'plan.json'} does not hold the precision and the budget of the run ({type(error).__name__}): restore "
                "the file, or start a new run in another --work-dir"
            )
    resolved, fault = world.gather((resolved, fault))[0]
    if fault:
        raise CheckpointError(fault)
    return resolved


def changes_since(state: Mapping[str, Any], identity: Mapping[str, Any], config_type: type, path: Path) -> list[str]:
    """Returns what differs between the run of a checkpoint and this one, a line each.

    Args:
        state: the content of the checkpoint.
        identity: of this run.
        config_type: of its config.
        path: of the checkpoint, for messages.
    Raises:
        CheckpointError: if it is of another kind of run, or its config cannot be read by this version.
    """
    if state.get("kind") != identity["kind"]:
        raise CheckpointError(f"{path} is not from a {identity['kind']} run: choose another --work-dir")
    try:
        # A key that is newer than the checkpoint had its default.
        before = to_dict(from_dict(config_type, state["config"]))
    except ConfigError as error:
        raise CheckpointError(
            f"{path} holds a config that this version cannot read: {'; '.join(error.faults)}. Resume with mae_et "
            f"{state.get('version', '(unknown version)')}"
        ) from error
    changes = changed_keys(before, identity["config"], RESUME_FREE)  # `batch_split` covers the micro batches
    if state["data_fingerprint"] != identity["data_fingerprint"]:
        changes.append(
            f"data.train: other images ({state['dataset_size']} before, {identity['dataset_size']} now, or other names)"
        )
    if state["metadata"].get("class_names") != identity["metadata"].get("class_names"):
        changes.append("classes: other names, or another order")
    if state["initial_weights"] != identity["initial_weights"]:
        changes.append("backbone: other weights")
    if state["batch_split"] != identity["batch_split"]:
        changes.append(f"processes and micro batches: {state['batch_split']} -> {identity['batch_split']}")
    return changes


def describe_data(source: ImageSource) -> dict[str, Any]:
    """Returns what identifies a data set wherever it is stored: its size and some of its names."""
    names = [Path(source.name(int(index))).name for index in spread(len(source), 64)]
    return {"data_fingerprint": [*names, str(len(source))], "dataset_size": len(source)}


def describe_model(model: nn.Module) -> str:
    """Returns the class and the size of a model in words."""
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"


def spread(num: int, limit: int) -> np.ndarray:
    """Returns up to `limit` indices, evenly spread over range(num)."""
    return np.unique(np.linspace(0, num - 1, min(num, limit)).round().astype(np.int64))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")
