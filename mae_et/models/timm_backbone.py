"""Builds any timm model, CSWin and PVT v1 included, for an input size."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mae_et.models.cswin
import mae_et.models.pvt  # noqa: F401  both register their models with timm
from mae_et.errors import UserError
from mae_et.models.resize import change_input_size, has_fixed_size, size_multiple


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


def backbone_size_multiple(name: str, image_size: int, in_chans: int = 3, **options: Any) -> int:
    """Returns the px that every image size of a model must be a multiple of; 1 for a model that takes any size.

    Args:
        name, image_size, options: as for `create_backbone`.
        in_chans: channels of the images.
    """
    with torch.device("meta"):
        return size_multiple(create_backbone(name, image_size, in_chans=in_chans, **options))


def forward_flops(name: str, image_size: int, in_chans: int = 3, **options: Any) -> int:
    """Counts the FLOPs of the forward pass of one image: matrix products and convolutions. No memory is allocated.

    Args:
        name, image_size, options: as for `create_backbone`.
        in_chans: channels of the images.
    Raises:
        UserError: as `create_backbone`.
    """
    with torch.device("meta"):
        model = create_backbone(name, image_size, in_chans=in_chans, **options).eval()
        image = torch.empty(1, in_chans, image_size, image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return int(counter.get_total_flops())
