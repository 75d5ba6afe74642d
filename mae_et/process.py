"""The process: how many cores it may use, and settings that must be made before torch is imported."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path


def prepare_process() -> None:
    """Sets environment variables that torch and its libraries read when they are imported. For programs only.

    OMP_WAIT_POLICY: idle threads sleep, because spinning ones take the cores from the loader processes.
    OMP_NUM_THREADS: torch counts the cores of the machine, also where a container may use a few of them only.
    USER and HOME: in a container, a user id without a passwd entry has neither, and torch needs both.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if available_cores() < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("USER", f"uid{os.getuid()}")
        os.environ.setdefault("HOME", tempfile.gettempdir())


def available_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the number of cores that this process may use: its affinity, or the quota of its container if that is less.

    Args:
        cgroup: where Linux mounts the control groups; version 2 (`cpu.max`) and 1 (`cpu/cpu.cfs_quota_us`) are read.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        words = (cgroup / "cpu.max").read_text().split()
    except OSError:
        try:
            words = [(cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")]
        except OSError:
            return cores
    try:
        quota, period = int(words[0]), int(words[1])
    except (ValueError, IndexError):  # "max": no quota
        return cores
    return cores if quota <= 0 or period <= 0 else max(1, min(cores, -(-quota // period)))
