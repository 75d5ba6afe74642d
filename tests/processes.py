"""Runs a function in several processes that form a world of gloo.

They are forked from a server that has imported the package, so they start without importing torch again.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mae_et.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
PRELOADED = ["mae_et.tasks.pretrain", "mae_et.tasks.classify", "torch.distributed.checkpoint", "downstream.run"]


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


class Started:
    """Processes that run, with the methods of subprocess.Popen that the tests use."""

    def __init__(self, processes: Sequence[Any], folder: Path) -> None:
        self.processes, self.folder = processes, folder

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    @property
    def returncode(self) -> int:
        """The first exit code that is not 0, if any; minus the signal that killed a process."""
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    @property
    def output(self) -> list[str]:
        """What each process wrote to stdout, and then what it wrote to stderr."""
        return [self.read("out", rank) + self.read("err", rank) for rank in range(len(self.processes))]

    def read(self, stream: str, rank: int = 0) -> str:
        return (self.folder / f"{stream}_{rank}.txt").read_text()

    def poll(self) -> int | None:
        return None if any(process.exitcode is None for process in self.processes) else self.returncode

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def wait(self, timeout: float = 300) -> str:
        """Waits for all processes and returns their output; hanging ones are killed after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [process for process in self.processes if process.exitcode is None]
        for process in hanging:
            process.kill()
        assert not hanging, f"{len(hanging)} processes hang: {self.output}"
        return "\n".join(self.output)


def start(
    work: Callable[[], Any],
    num: int,
    folder: Path,
    variables: Callable[[int, int, int], dict[str, str]] = torchrun,
) -> Started:
    """Starts a function of a module in several processes. Their output goes to out_N.txt and err_N.txt in `folder`.

    Args:
        work: what to run; can be pickled.
        num: number of processes.
        folder: is created.
        variables: (rank, number of processes, free port) -> environment of a process.
    """
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    processes = [
        context.Process(target=_work, args=(work, variables(rank, num, port), folder, rank)) for rank in range(num)
    ]
    for process in processes:
        process.start()
    return Started(processes, folder)


def run(
    work: Callable[[], Any],
    num: int,
    folder: Path,
    variables: Callable[[int, int, int], dict[str, str]] = torchrun,
    timeout: float = 300,
) -> list[tuple[int, str]]:
    """Runs as `start` to the end.

    Returns:
        Exit code, or minus the signal, and output of each process.
    """
    started = start(work, num, folder, variables)
    started.wait(timeout)
    return list(zip((process.exitcode for process in started.processes), started.output, strict=True))


def run_command(*words: object, cwd: Path = REPOSITORY, **environment: str) -> CompletedProcess[str]:
    """Runs `mae-et WORDS` to the end."""
    with TemporaryDirectory() as folder:
        started = start_command(words, Path(folder) / "output", cwd=cwd, **environment)
        started.wait()
        return CompletedProcess(words, started.returncode, started.read("out"), started.read("err"))


def start_command(
    words: Sequence[object], folder: Path, num: int = 1, cwd: Path = REPOSITORY, **environment: str
) -> Started:
    """Starts `mae-et WORDS`, in `num` processes as torchrun does, without torchrun.

    Args:
        words: of the command line.
        folder: for the output; is created.
        num: number of processes; 1: without torchrun's variables.
        cwd: the folder to start in.
        **environment: of the processes, in addition to that of this one.
    """
    variables = partial(_variables, environment)
    return start(partial(_command, tuple(map(str, words)), cwd), num, folder, variables)


def _variables(environment: dict[str, str], rank: int, num: int, port: int) -> dict[str, str]:
    return {**os.environ, **environment, **(torchrun(rank, num, port) if num > 1 else {})}


def _command(words: tuple[str, ...], cwd: Path) -> None:
    from mae_et.__main__ import main

    os.chdir(cwd)
    sys.argv = ["mae-et", *words]
    main()


def _work(work: Callable[[], Any], variables: dict[str, str], folder: Path, rank: int) -> None:
    with open(folder / f"out_{rank}.txt", "w") as out, open(folder / f"err_{rank}.txt", "w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
        faulthandler.dump_traceback_later(200)  # where a process hangs
        os.environ |= variables
        torch.set_num_threads(1)
        # A loader process starts as it does for a user, not by a server.
        multiprocessing.set_start_method(None, force=True)
        code = 0
        try:
            work()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except UserError as error:
            code = error.exit_code
            print(error, flush=True)
        except BaseException:
            code = 99
            traceback.print_exc()
        print(f"{time.process_time():.1f} s of CPU time", file=sys.stderr, flush=True)
    os._exit(code)
