"""Paired measuring: variants alternate in one process; rows of a table; the machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from mae_et.errors import UserError

Variants = dict[str, Callable[[], Any]]
Comparison = dict[str, Any]  # a row of the table, as from `compare`


class Times(NamedTuple):
    """Seconds of each run."""

    wall: list[float]
    cpu: list[float]  # of all threads: what other processes take does not count, waiting threads do


def measure(variants: Variants, rounds: int) -> dict[str, Times]:
    """Runs the variants in turn, round after round, each round in the opposite order of the one before.

    Returns:
        The times by variant. The first round is not kept.
    """
    times = {name: Times([], []) for name in variants}
    for i in range(rounds + 1):
        for name in list(variants)[:: -1 if i % 2 else 1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            variants[name]()
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
            if i:
                times[name].wall.append(seconds)
                times[name].cpu.append(cpu_seconds)
    return times


def compare(
    title: str, times: dict[str, Times], ours: str, reference: str, goal: float | None, work: float = 1.0
) -> Comparison:
    """Returns a row of the table.

    Args:
        title: of the row.
        times: as from `measure`.
        ours, reference: variants.
        goal: of the ratio reference / ours of the median times a unit of work; None: for information.
        work: units of work of ours for one of the reference's (images, where the batches differ).
    """
    a, b = times[ours], times[reference]
    ratio = work * statistics.median(b.wall) / statistics.median(a.wall)
    return {
        "title": title,
        "ours_ms": {"median": 1e3 * statistics.median(a.wall), "min": 1e3 * min(a.wall)},
        "reference_ms": {"median": 1e3 * statistics.median(b.wall), "min": 1e3 * min(b.wall)},
        "ratio": ratio,
        "ratio_of_minima": work * min(b.wall) / min(a.wall),
        "ratio_of_cpu_time": work * statistics.median(b.cpu) / statistics.median(a.cpu),
        "goal": goal,
        "met": None if goal is None else ratio >= goal,
        "raw_ms": {
            f"{name}, {kind}": [1e3 * t for t in getattr(side, kind)]
            for name, side in (("ours", a), ("reference", b))
            for kind in Times._fields
        },
    }


def table(comparisons: list[Comparison]) -> str:
    rows = [["", "ours ms: median", "min", "reference ms: median", "min", "ratio", "minima", "CPU", "goal", ""]]
    for c in comparisons:
        numbers = [c[side][kind] for side in ("ours_ms", "reference_ms") for kind in ("median", "min")]
        goal = ["", ""] if c["goal"] is None else [f">= {c['goal']:g}", "met" if c["met"] else "MISSED"]
        ratios = [f"{c[key]:.2f}" for key in ("ratio", "ratio_of_minima", "ratio_of_cpu_time")]
        rows.append([c["title"], *(f"{number:.1f}" for number in numbers), *ratios, *goal])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    legend = "ratio: reference over ours, of the medians; minima: of the fastest runs; CPU: of the median CPU times"
    memory = [_memory_line(c) for c in comparisons if "memory_ratio" in c]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], legend, *memory])


def _memory_line(c: Comparison) -> str:
    goal = (
        "" if c["memory_goal"] is None else f", goal >= {c['memory_goal']:g}: {'met' if c['memory_met'] else 'MISSED'}"
    )
    ours, reference, ratio = c["ours_mb"], c["reference_mb"], c["memory_ratio"]
    return f"peak memory, {c['title']}: {ours:.0f} MB, reference {reference:.0f} MB, ratio {ratio:.2f}{goal}"


def describe_machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load": round(os.getloadavg()[0], 2),
        **gpu,
    }


def check_equal(what: str, ours: Tensor, reference: Tensor, tolerance: float) -> None:
    error = ((ours - reference).abs().max() / reference.abs().max()).item()
    if not error <= tolerance:
        raise UserError(
            f"{what}: ours differs from the reference by {error:.2g} of its largest value, above {tolerance:g}"
        )
