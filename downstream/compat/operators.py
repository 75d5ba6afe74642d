"""torchvision's nms and RoIAlign in place of mmcv's compiled operators, so that no compiler is needed.

The wheel that `pip install onedl-mmcv` makes has no `mmcv._ext`. Without it `mmcv.ops` and mmdet cannot be imported.
`provide_operators` adds a module of that name: the operators of Mask R-CNN come from torchvision, any other one raises an
error with the commands that compile mmcv. A compiled `mmcv._ext` is used as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import torch
import torchvision
from torch import Tensor

from mae_et.errors import UserError

EXTENSION = "mmcv._ext"
COMPILE = (
    "compile mmcv (a C++ compiler, 10 to 20 minutes): pip install 'setuptools>=80,<82' wheel && "
    "pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir onedl-mmcv==2.3.6"
)


class MissingOperatorError(UserError, NotImplementedError):
    """Raised for an operator of mmcv without a counterpart in torchvision."""


def provide_operators() -> str:
    """Makes `mmcv.ops` importable.

    Returns:
        "compiled": mmcv's own operators; "torchvision": the stand-in; "none": mmcv is not installed.
    Raises:
        UserError: if mmcv was compiled and its operators do not load, e.g. because torch has changed since.
    """
    loaded = sys.modules.get(EXTENSION)
    if loaded is not None:
        return "torchvision" if isinstance(loaded, _StandIn) else "compiled"
    if importlib.util.find_spec("mmcv") is None:
        return "none"
    if importlib.util.find_spec(EXTENSION) is not None:
        try:
            importlib.import_module(EXTENSION)
        except ImportError as error:
            raise UserError(
                f"mmcv's compiled operators do not load ({error}). Most often torch has changed since. "
                f"{COMPILE}; or do without: pip install --force-reinstall --no-deps onedl-mmcv==2.3.6"
            ) from error
        return "compiled"
    sys.modules[EXTENSION] = importlib.util.module_from_spec(ModuleSpec(EXTENSION, _Loader(), origin="torchvision"))
    return "torchvision"


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Returns the indices of the boxes that remain, highest score first.

    Args:
        boxes: [N, 4] as x1, y1, x2, y2.
        scores: [N].
        iou_threshold: of two boxes with a higher IoU, the one with the lower score is removed.
        offset: 1: a box is x2 - x1 + 1 wide, in pixels; 0: it is x2 - x1 wide.
    """
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes.float(), scores.float(), iou_threshold)


def roi_align_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Writes the result of RoIAlign into `output` [R, C, h, w]; the arguments are those of mmcv's function.

    Half precision is computed in float32: torchvision has no bfloat16 kernel.
    """
    _check_average(pool_mode)
    output.copy_(
        torch.ops.torchvision.roi_align(
            features.float(), rois.float(), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Adds the gradient of the features [N, C, H, W] to `grad_input`."""
    _check_average(pool_mode)
    gradient = torch.ops.torchvision._roi_align_backward(
        grad_output.float(),
        rois.float(),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    grad_input.add_(gradient)


OPERATORS: dict[str, Callable[..., Any]] = {
    "nms": nms,
    "roi_align_forward": roi_align_forward,
    "roi_align_backward": roi_align_backward,
}


class _StandIn(ModuleType):
    """Has every operator that mmcv.ops looks up on import; those without a counterpart raise when they are called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return OPERATORS.get(name) or _missing(name)


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name, __doc__)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _missing(name: str) -> Callable[..., NoReturn]:
    def operator(*args: object, **kwargs: object) -> NoReturn:
        raise MissingOperatorError(
            f"mmcv's operator {name!r} is needed, and torchvision has no counterpart. To fix: {COMPILE}"
        )

    return operator


def _check_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise MissingOperatorError(
            f"mmcv's RoIAlign with pool_mode='max' is needed, and torchvision's averages. To fix: {COMPILE}"
        )
