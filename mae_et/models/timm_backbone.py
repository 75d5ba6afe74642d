"""Builds any timm model, CSWin and PVT v1 included, for an input size."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from torch import nn

import mae_et.models.cswin
import mae_et.models.pvt  # noqa: F401  both register their models with timm
from mae_et.errors import UserError
from mae_et.models.resize import change_input_size, has_fixed_size


def create_backbone(name: str, image_size: int, **options: Any) -> nn.Module:
    """Builds a timm model with random weights whose position tables have the size of the images from the start.

    timm's `img_size` alone would keep the windows of Swin: 7 patches at any size. Here they scale with the grid as in
    `change_input_size`, so B / 32 for Swin. The alternative of resizing a new model would shrink its initial position tables.

    Args:
        name: of the model, e.g. "resnet50", "swin_tiny_patch4_window7_224", "cswin_tiny_224", "pvt_small".
        image_size: B in px. Models that take any size ignore it.
        options: for timm.create_model, e.g. num_classes, drop_path_rate, patch_size.
    Raises:
        UserError: if timm has no model of that name, or the model cannot take images of that size.
    """
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        raise UserError(f"unknown model {name!r}. Similar names: {', '.join(near) or 'none'}; all: timm.list_models()")
    # The published model on the meta device has the ratio of windows to grid. A patch size keeps that ratio.
    with torch.device("meta"):
        own = ("patch_size", "pretrained")
        probe: Any = timm.create_model(name, **{key: value for key, value in options.items() if key not in own})
    if not has_fixed_size(probe):
        return timm.create_model(name, **options)
    if "patch_size" in options and hasattr(probe, "set_input_size"):
        probe.set_input_size(patch_size=options["patch_size"])
    change_input_size(probe, None, None, image_size)
    # The probe holds these arguments only if its size is not the published one.
    sizes = {key: value for key, value in probe._model_args.items() if key in ("img_size", "window_size")}
    return timm.create_model(name, **{**sizes, **options})
