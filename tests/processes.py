"""Runs a function in several processes that form a world of gloo.

They are forked from a server that has imported the package, so they start without importing torch again.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mae_et.errors import UserError


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def torchrun(rank: int, num: int, port: int) -> dict[str, str]:
    """Returns torchrun's variables for one machine."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def run(
    work: Callable[[], Any],
    num: int,
    folder: Path,
    variables: Callable[[int, int, int], dict[str, str]] = torchrun,
    timeout: float = 300,
) -> list[tuple[int, str]]:
    """Runs a function of a module in several processes to the end. Their output goes to folder/rank_N.txt.

    Args:
        work: what to run; can be pickled.
        num: number of processes.
        folder: is created.
        variables: (rank, number of processes, free port) -> environment of a process.
        timeout: seconds; hanging processes are killed.
    Returns:
        Exit code, or minus the signal, and output of each process.
    """
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.processes", "mae_et.tasks.pretrain", "torch.distributed.checkpoint"])
    port = free_port()
    started = []
    for rank in range(num):
        started.append(
            context.Process(target=_work, args=(work, variables(rank, num, port), folder / f"rank_{rank}.txt"))
        )
        started[-1].start()
    deadline = time.monotonic() + timeout
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [process for process in started if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert not hanging, f"{len(hanging)} processes hang: {shown(folder, num)}"
    return list(zip((process.exitcode for process in started), shown(folder, num), strict=True))


def shown(folder: Path, num: int) -> list[str]:
    return [(folder / f"rank_{rank}.txt").read_text() for rank in range(num)]


def _work(work: Callable[[], Any], variables: dict[str, str], output: Path) -> None:
    with open(output, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        faulthandler.dump_traceback_later(200)  # where a process hangs
        os.environ |= variables
        torch.set_num_threads(1)
        code = 0
        try:
            work()
        except UserError as error:
            code = error.exit_code
            print(error, flush=True)
        except BaseException:
            code = 99
            traceback.print_exc()
        print(f"{time.process_time():.1f} s of CPU time", flush=True)
    os._exit(code)
