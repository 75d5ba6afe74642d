"""The device at hand: arithmetic of known GPUs, memory of this machine."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

# TFLOP/s without sparsity, at the maker's boost clock, sums in fp32: of NVIDIA's data sheets and, for GeForce, of its
# architecture white papers (Ampere GA102, Ada, RTX Blackwell). Where they print sparse figures only, half of them.
# fp16, bf16 and tf32 are those of the tensor cores, fp32 is that of the ordinary ones. "NVIDIA", "Tesla", "GeForce" and the
# size of the memory are left out of the names.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "V100-SXM2": {"fp16": 125, "fp32": 15.7},
    "V100-PCIE": {"fp16": 112, "fp32": 14},
    "T4": {"fp16": 65, "fp32": 8.1},
    "A10": {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2},
    "A10G": {"bf16": 70, "fp16": 70, "tf32": 35, "fp32": 31.5},
    "A30": {"bf16": 165, "fp16": 165, "tf32": 82, "fp32": 10.3},
    "A40": {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4},
    "RTX A6000": {"bf16": 154.8, "fp16": 154.8, "tf32": 77.4, "fp32": 38.7},
    "A100-SXM4": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    "A100-PCIE": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    "A100 PCIe": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    "L4": {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3},
    "L40": {"bf16": 181, "fp16": 181, "tf32": 90.5, "fp32": 90.5},
    "L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},
    "RTX 6000 Ada Generation": {"bf16": 364.2, "fp16": 364.2, "tf32": 182.1, "fp32": 91.1},
    "H100": {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},  # the SXM card: "NVIDIA H100 80GB HBM3"
    "H100 PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51.2},
    "H100 NVL": {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60},
    "H200": {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "H200 NVL": {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60},
    "GH200": {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "B200": {"bf16": 2250, "fp16": 2250, "tf32": 1125, "fp32": 75},
    "RTX 3090": {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6},
    "RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "RTX 5090": {"bf16": 209.5, "fp16": 209.5, "tf32": 104.8, "fp32": 104.8},
}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Returns the most TFLOP/s (1e12 multiplications and additions a second) that matrix products can reach.

    Args:
        device_name: as CUDA gives it, e.g. "NVIDIA A100-SXM4-80GB".
        precision: "bf16", "fp16", "tf32" or "fp32".
    Returns:
        None for a CPU, an unknown card, a slice of one (MIG), and a precision that its tensor cores do not have.
    """
    name = re.sub(r"^(NVIDIA|Tesla|GeForce|\s)+", "", device_name)
    name = re.sub(r"[\s-]\d+GB|\sHBM\w+", "", name)  # its memory
    return PEAK_TFLOPS.get(name, {}).get(precision)


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Returns the memory in bytes that new pages can take without swapping: the machine's, or the container's if less.

    Args:
        proc, cgroup: where Linux reports it.
    Returns:
        None if it is unknown.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        entries = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines()]
    except (OSError, ValueError, IndexError):
        return None
    for _, kinds, path in entries:
        if kinds == "":  # version 2
            root, names = cgroup, ("memory.max", "memory.current")
        elif "memory" in kinds.split(","):
            root, names = cgroup / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
                free.append(max(0, limit - used + _reclaimable(folder)))
            except (OSError, ValueError):
                pass  # no limit at this level
            if folder == root:
                break
    return min(free, default=None)


def process_memory(key: str) -> int:
    """Returns the memory of this process in bytes: current ("VmRSS") or peak ("VmHWM"). Returns 0 outside Linux.

    getrusage would also count the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _reclaimable(folder: Path) -> int:
    """Bytes of the file cache that a control group counts as used but gives up when asked."""
    fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(fields.get("inactive_file", 0))


def release_freed_memory() -> None:
    """Gives memory that was freed back to the system. Does nothing without glibc, which keeps blocks below 32 MiB for itself."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
