"""Parameter groups: who decays. The learning rate over a run is the Plan's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Tells whether weight decay applies: to matrices and tokens, not to biases and norms.

    Source: MAE (arXiv 2111.06377), as in its released code.
    """
    return parameter.ndim > 1 and not name.endswith(".bias")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the trainable parameters, named, into a decayed and an undecayed group."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(name, p) for name, p in named if decays(name, p)], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the absolute learning rate; a group's `lr_scale`, where it has one, multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
