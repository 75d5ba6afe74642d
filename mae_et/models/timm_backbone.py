"""Builds any timm model, CSWin and PVT v1 included, for an input size."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mae_et.models.cswin
import mae_et.models.pvt  # noqa: F401  both register their models with timm
from mae_et.errors import UserError
from mae_et.models.resize import change_input_size, has_fixed_size, model_name
from mae_et.models.sizes import Size, as_size, size_text


def create_backbone(name: str, image_size: int | Size, **options: Any) -> nn.Module:
    """Builds a timm model with random weights whose position tables have the size of the images from the start.

    timm's `img_size` alone would keep the windows of Swin: 7 patches at any size. Here they scale with the grid as in
    `change_input_size`, so B / 32 for Swin. The alternative of resizing a new model would shrink its initial position tables.

    Args:
        name: of the model, e.g. "resnet50", "swin_tiny_patch4_window7_224", "cswin_tiny_224", "pvt_small".
        image_size: px, the side of a square or (H, W). Models that take any size ignore it.
        options: for timm.create_model, e.g. num_classes, drop_path_rate, patch_size.
    Raises:
        UserError: if timm has no model of that name, the model does not take an option or its value, or it cannot take images
            of that size.
    """
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        raise UserError(f"unknown model {name!r}. Similar names: {', '.join(near) or 'none'}; all: timm.list_models()")
    # The published model on the meta device has the ratio of windows to grid. A patch size keeps that ratio.
    with torch.device("meta"):
        own = ("patch_size", "pretrained")
        probe = _create(name, {key: value for key, value in options.items() if key not in own})
    on_meta = torch.get_default_device().type == "meta"  # the probe is what the caller asks for
    if not has_fixed_size(probe):
        return probe if on_meta and "patch_size" not in options else _create(name, options)
    with _without_resize_log(), _explained(name, options):
        if "patch_size" in options and hasattr(probe, "set_input_size"):
            probe.set_input_size(patch_size=options["patch_size"])
        change_input_size(probe, None, None, image_size)
    if on_meta:
        return probe
    # The probe holds these arguments only if its size is not the published one.
    sizes = {key: value for key, value in probe._model_args.items() if key in ("img_size", "window_size")}
    return _create(name, {**options, **sizes})


def meta_backbone(name: str, image_size: int | Size, **options: Any) -> nn.Module:
    """Builds a model without memory, to ask for its sizes and costs; arguments and errors as for `create_backbone`."""
    with torch.device("meta"):
        return create_backbone(name, image_size, **options).eval()


def forward_flops(model: nn.Module, image_size: int | Size, in_chans: int = 3) -> int:
    """Counts the FLOPs of the forward pass of one image: matrix products and convolutions.

    Args:
        model: from `meta_backbone`; its input size is changed.
        image_size: px, side or (H, W).
        in_chans: channels of the images.
    Raises:
        UserError: if the model cannot take images of that size, or does not return one row of logits per image.
    """
    with _without_resize_log():
        change_input_size(model, None, None, image_size)
    name = model_name(model)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            logits = model(torch.empty(1, in_chans, *as_size(image_size), device="meta"))
    except Exception as error:
        raise UserError(
            f"{name} cannot take images of {size_text(image_size)} px: {_first_line(error)}; choose larger images, or correct "
            "the model's options"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        shape = f"a tensor {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"{name} gives {shape} for one image, not one row of logits: correct the model's options (global_pool must pool), or "
            "choose a classifier"
        )
    return int(counter.get_total_flops())


def _create(name: str, options: dict[str, Any]) -> Any:
    if options.get("pretrained"):  # a failed download explains itself
        return timm.create_model(name, **options)
    with _explained(name, options):
        return timm.create_model(name, **options)


@contextlib.contextmanager
def _explained(name: str, options: dict[str, Any]) -> Iterator[None]:
    """Turns an error of timm into one line that names the options. A wrong value can lead to any exception."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _first_line(error)
        raise UserError(f"timm cannot build {name} with {options}: {reason}; {_hint(name, options, reason)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _hint(name: str, options: dict[str, Any], reason: str) -> str:
    """Returns how to correct the options: the nearest known name of one that the class of the model does not have."""
    with torch.device("meta"), contextlib.suppress(Exception):
        known = [*inspect.signature(type(timm.create_model(name)).__init__).parameters][1:]
        for option in options:
            if option in reason and option not in known:
                if option == "drop_path_rate":
                    return "the model has no stochastic depth, so set drop_path_rate=0"
                near = difflib.get_close_matches(option, known, n=3)
                return f"did you mean {' or '.join(near)}?" if near else f"remove {option}"
    return "correct the options"


@contextlib.contextmanager
def _without_resize_log() -> Iterator[None]:
    """Silences timm's line about a resampled position embedding: on the meta device there are no values to resample."""
    logger = logging.getLogger("timm.layers.pos_embed")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
