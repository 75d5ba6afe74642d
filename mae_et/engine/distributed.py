"""One or several processes, started by torchrun or srun: the rank of this one, and collective calls."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mae_et.engine.slurm import slurm_variables
from mae_et.errors import UserError

log = logging.getLogger(__name__)

MEETING_TIME = timedelta(minutes=30)

Items = TypeVar("Items", Tensor, np.ndarray)


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    local_size: int  # processes on this machine
    device: torch.device
    control: dist.ProcessGroup | None = None  # a gloo group for host-side agreement; None: alone

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Tells whether the flag is set in any process. On the host, no device is waited for."""
        if self.control is None:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return bool(value)

    def mean(self, value: Tensor) -> Tensor:
        """Averages a tensor over the processes."""
        if self.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.size

    def gather(self, value: object) -> list:
        """Collects a small object of each process, on all of them."""
        if self.control is None:
            return [value]
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def share(self, items: Items, unit: int = 1) -> Items:
        """Returns this process's part of the items.

        Args:
            items: [n, ...], the same on every process.
            unit: the parts are cut at multiples of this number only.
        Returns:
            [m, ...], consecutive items. The parts of all processes in rank order are the items; m may be 0.
        """
        num_units = -(-len(items) // unit)
        first, last = (num_units * rank // self.size * unit for rank in (self.rank, self.rank + 1))
        return items[first:last]

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenates the rows of all processes in rank order, on every process.

        Args:
            rows: [m, ...] on the world's device; m may differ. Where m is 0, the other sizes may differ too.
        Returns:
            [sum of m, ...].
        """
        if self.size == 1:
            return rows
        shapes = self.gather(tuple(rows.shape))  # waits on the host, so a slow process meets no device timeout
        longest = max(shapes)
        padded = rows.new_zeros(longest)
        if len(rows):
            padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in shapes]
        dist.all_gather(parts, padded)
        return torch.cat([part[: shape[0]] for part, shape in zip(parts, shapes, strict=True)])

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors in place with the main process's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(group=self.control)


def restarts_by_itself() -> bool:
    """Returns whether torchrun restarts lost processes (`--max-restarts`). A run then resumes without being asked."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


@contextlib.contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """Joins the other processes if torchrun or srun started several, and leaves them at the end.

    Args:
        device: "cpu" or "cuda"; None: CUDA where there is one.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    os.environ |= (by_slurm := slurm_variables(os.environ))
    size = _world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if by_slurm and kind == "cuda" and torch.cuda.device_count() == 1:
        local_rank = 0  # srun --gpus-per-task=1 shows each process its own GPU only
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine finds no GPU: {torch.cuda.device_count()} are visible. Start as many "
            "processes as there are GPUs, or use --device cpu"
        )
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, 1, place)
        return
    _meet(kind, place, size)
    try:
        control = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if dist.get_rank() > 0:  # what the processes have in common is logged once
            logging.getLogger("mae_et").setLevel(logging.ERROR)
        yield World(dist.get_rank(), size, local_size, place, control)
    finally:
        dist.destroy_process_group()


def _world_size() -> int:
    """Returns the number of processes, after a check of the variables that torchrun sets.

    Raises:
        UserError: if some are set and others are missing.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE = {size}, but {', '.join(missing)} not set: the processes cannot find each other. Start them with "
            f"torchrun --standalone --nproc_per_node {size}, or unset WORLD_SIZE to run one process"
        )
    return size


def _meet(kind: str, place: torch.device, size: int) -> None:
    """Waits for the other processes.

    Raises:
        UserError: if they do not come in time, or the port is in use.
    """
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if os.environ["RANK"] == "0":
        log.info("waiting for %d other processes at %s", size - 1, address)
    try:
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo", device_id=place if kind == "cuda" else None, timeout=MEETING_TIME
        )
    except (dist.DistError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the {size} processes did not meet at {address} ({str(error).splitlines()[0]}). Start all of them within "
            f"{MEETING_TIME}; if another job uses the port, choose one with torchrun --master_port, or use --standalone"
        ) from error
