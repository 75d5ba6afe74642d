"""Parameter groups by layer and weight decay. The plan defines the learning rate of each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def decays(name: str, parameter: torch.Tensor, no_decay: tuple[str, ...] = ()) -> bool:
    """Returns whether weight decay applies: to matrices and tokens, but not to biases, norms and names in `no_decay`.

    Source: released code of MAE (arXiv 2111.06377).
    """
    return parameter.ndim > 1 and not name.endswith(".bias") and name.split(".")[-1] not in no_decay


def layer_of(name: str, depth: int) -> int:
    """Returns the layer of a ViT parameter: 0 for embeddings and tokens, i + 1 for block i, depth + 1 for the rest."""
    parts = name.split(".")
    if parts[0] in ("cls_token", "reg_token", "mask_token", "pos_embed", "patch_embed"):
        return 0
    return int(parts[1]) + 1 if parts[0] == "blocks" else depth + 1


def param_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    depth: int | None = None,
    no_decay: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Groups the named trainable parameters by weight decay and, if layer_decay is below 1, by layer.

    Args:
        model: has the parameter names of timm's ViT.
        weight_decay: for the parameters for which `decays` is true.
        layer_decay: each group's `lr_scale` is layer_decay ** (depth + 1 - layer).
        depth: number of blocks; required if layer_decay is below 1.
        no_decay: last parts of further names without weight decay.
    Raises:
        ValueError: if layer_decay is below 1 and depth is None.
    Source: layer-wise learning-rate decay of ELECTRA and BEiT (arXiv 2106.08254), numbered as in MAE's fine-tuning.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decayed, scale = 0, decays(name, parameter, no_decay), 1.0
        if layer_decay != 1.0:
            if depth is None:
                raise ValueError(f"layer_decay = {layer_decay} needs depth, the number of blocks")
            layer = layer_of(name, depth)
            scale = layer_decay ** (depth + 1 - layer)
        group = {"params": [], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
        groups.setdefault((layer, decayed), group)["params"].append((name, parameter))
    return list(groups.values())


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the absolute learning rate of each group, multiplied by the `lr_scale` of the group if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
