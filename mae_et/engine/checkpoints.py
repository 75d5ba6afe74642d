"""Saves the state of a training: one file by the main process, or under FSDP2 a folder to which each process adds its part."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mae_et.engine.distributed import World
from mae_et.engine.parallel import Parallel
from mae_et.storage.atomic import atomic_path
from mae_et.storage.checkpoint import remove_others, save_checkpoint
from mae_et.storage.sharded_checkpoint import stage, write_sharded


class Checkpoints:
    """The checkpoints of a run. All processes call its methods.

    A sharded save copies the tensors to the CPU and writes them in a thread while the training continues. It is awaited
    before the next save and at the end. As a context manager it awaits the save in progress when the training fails.

    Args:
        folder: gets the checkpoints.
        keep: number of newest checkpoints that are kept.
        world: this process among the others.
        parallel: of the run.
    """

    def __init__(self, folder: Path, keep: int, world: World, parallel: Parallel) -> None:
        self.folder, self.keep, self.world, self.parallel = folder, keep, world, parallel
        self.in_progress: Future[None] | None = None
        if parallel.is_sharded:
            # A group of its own: the thread's collectives must not mix with those of the training.
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
            self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(Exception):  # another error is on its way; `save` and `wait` raise this one otherwise
            self.wait()

    def save(self, step: int, values: Mapping[str, Any]) -> None:
        """Saves the tensors and plain values of a step. Sharded: an error is raised by the next `save` or `wait`.

        Raises:
            CheckpointError: if this or, sharded, the save before it failed.
        """
        if self.parallel.is_sharded:
            self.wait()
            path = self.folder / f"step_{step:08d}"
            values = {**values, "optimizer_values": self.parallel.optimizer_values()}
            staged = stage(self.parallel.tensors(), path)
            self.in_progress = self.thread.submit(self._write, staged, values, path)
            return
        if self.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint({**values, **self.parallel.state()}, self.folder, step, self.keep)
        self.world.barrier()

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
            CheckpointError: if it failed.
        """
        future, self.in_progress = self.in_progress, None
        if future is not None:
            future.result()

    def dump(self, path: Path, values: Mapping[str, Any]) -> str:
        """Writes the state at once beside the checkpoints, for a look at it. Returns the name of the file or folder.

        Args:
            path: without a suffix.
            values: plain values.
        """
        if self.parallel.is_sharded:
            self.wait()
            write_sharded(stage(self.parallel.tensors(), path), values, path, self.group)
            return path.name
        file = path.with_suffix(".pt")
        if self.world.is_main:
            with atomic_path(file) as temporary:
                torch.save({**values, **self.parallel.state()}, temporary)
        return file.name

    def _write(self, staged: dict[str, torch.Tensor], values: Mapping[str, Any], path: Path) -> None:
        write_sharded(staged, values, path, self.group)
        if self.world.is_main:
            remove_others(path, self.keep)
