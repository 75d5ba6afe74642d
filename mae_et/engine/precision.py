"""The number format of the matrix products, and what a device can reach in it."""

from __future__ import annotations

import torch

from mae_et.engine.hardware import peak_tflops
from mae_et.errors import UserError


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Returns the dtype that matrix products run in; None for float32.

    Args:
        precision: "auto", "fp32", "bf16" or "fp16".
        device: of the training.
    Raises:
        UserError: for fp16 without a GPU.
    """
    if precision == "auto":
        precision = choose_precision(device)
    if precision == "fp16" and device.type == "cpu":
        raise UserError("run.precision = 'fp16' needs a GPU; use 'bf16' or 'fp32' on a CPU")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def choose_precision(device: torch.device) -> str:
    """Returns what `run.precision = "auto"` means on a device: "bf16" where it has fast bfloat16 products, else "fp32"."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = cpu_has_bf16()
    return "bf16" if has_bf16 else "fp32"


def cpu_has_bf16() -> bool:
    """Returns whether this CPU has instructions for bfloat16 products that PyTorch uses: AVX512_BF16 or AMX.

    Other CPUs, ARM among them, compute bfloat16 slower than float32 or were not measured.
    """
    # Private names of torch.cpu: a version without one of them counts as a CPU without the instructions.
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.backends.mkldnn.is_available() and any(test() for test in tests if test is not None)


def device_peak_tflops(precision: str, device: torch.device) -> float | None:
    """Returns the peak TFLOP/s of the device at the precision of a run; None where it is not known."""
    if device.type != "cuda":
        return None
    float32 = "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", None: float32}
    return peak_tflops(torch.cuda.get_device_name(device), names[autocast_dtype(precision, device)])
