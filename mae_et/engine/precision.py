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
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else None
    if precision == "fp16" and device.type == "cpu":
        raise UserError("run.precision = 'fp16' needs a GPU; use 'bf16' or 'fp32' on a CPU")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def device_peak_tflops(precision: str, device: torch.device) -> float | None:
    """Returns the peak TFLOP/s of the device at the precision of a run; None where it is not known."""
    if device.type != "cuda":
        return None
    float32 = "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", None: float32}
    return peak_tflops(torch.cuda.get_device_name(device), names[autocast_dtype(precision, device)])
