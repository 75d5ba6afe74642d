"""Peak memory of a step, in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mae_et.engine.hardware import process_memory


def peak_of(make: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """Returns by how many MB (2^20) the second call of `make(*arguments)` raises the memory of a fresh process.

    The first call pays for what stays; then the high-water mark is reset.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, make, arguments, torch.get_num_threads()).result()


def _peak(make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...], num_threads: int) -> float:
    torch.set_num_threads(num_threads)
    run = make(*arguments)
    before = process_memory("VmRSS")
    run()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark
    run()
    return (process_memory("VmHWM") - before) / 2**20


def compare_memory(peaks: dict[str, float], ours: str, reference: str, goal: float | None) -> dict[str, Any]:
    """Returns what a row of the table gets besides the times; the goal is one of reference / ours."""
    ratio = peaks[reference] / peaks[ours]
    return {
        "ours_mb": peaks[ours],
        "reference_mb": peaks[reference],
        "memory_ratio": ratio,
        "memory_goal": goal,
        "memory_met": None if goal is None else ratio >= goal,
    }
