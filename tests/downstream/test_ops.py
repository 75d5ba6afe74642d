"""The stand-in for mmcv's compiled operators, against references written from the formulas."""

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import downstream.compat.operators as ops
from downstream.compat.operators import (
    MissingOperatorError,
    nms,
    provide_operators,
    roi_align_backward,
    roi_align_forward,
)
from mae_et.errors import UserError
from tests.conftest import REPOSITORY
from tests.downstream.conftest import needs_mm


def naive_nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float, offset: int) -> list[int]:
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        x1, y1, x2, y2 = boxes[i].tolist()
        for j in kept:
            u1, v1, u2, v2 = boxes[j].tolist()
            overlap = max(0.0, min(x2, u2) - max(x1, u1) + offset) * max(0.0, min(y2, v2) - max(y1, v1) + offset)
            areas = (x2 - x1 + offset) * (y2 - y1 + offset) + (u2 - u1 + offset) * (v2 - v1 + offset)
            if overlap > threshold * (areas - overlap):
                break
        else:
            kept.append(i)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
def test_nms__equals_the_definition(offset):
    torch.manual_seed(0)
    corners = torch.rand(60, 2) * 30
    boxes = torch.cat([corners, corners + 2 + torch.rand(60, 2) * 15], dim=1)
    scores = torch.rand(60)
    expected = naive_nms(boxes, scores, 0.4, offset)
    assert 5 < len(expected) < 55
    assert nms(boxes, scores, 0.4, offset).tolist() == expected


def bilinear(image: torch.Tensor, y: float, x: float) -> torch.Tensor:
    height, width = image.shape[-2:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return image.new_zeros(image.shape[0])
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    return (
        (1 - v) * ((1 - u) * image[:, top, left] + u * image[:, top, right])
        + v * ((1 - u) * image[:, bottom, left] + u * image[:, bottom, right])
    )  # fmt: skip


def naive_roi_align(features, rois, size, scale, samples):
    out = []
    for index, x1, y1, x2, y2 in rois.tolist():
        x1, y1, x2, y2 = (value * scale - 0.5 for value in (x1, y1, x2, y2))
        cells = []
        for row in range(size):
            for column in range(size):
                points = [
                    bilinear(
                        features[int(index)],
                        y1 + (y2 - y1) * (row + (a + 0.5) / samples) / size,
                        x1 + (x2 - x1) * (column + (b + 0.5) / samples) / size,
                    )
                    for a in range(samples)
                    for b in range(samples)
                ]
                cells.append(torch.stack(points).mean(0))
        out.append(torch.stack(cells, dim=1).view(features.shape[1], size, size))
    return torch.stack(out)


def test_roi_align__value_and_gradient_equal_the_definition():
    torch.manual_seed(0)
    features = torch.randn(2, 3, 9, 11, requires_grad=True)
    rois = torch.tensor([[0, 2.0, 3.0, 30.0, 25.0], [1, -4.0, 10.0, 20.0, 35.0], [1, 8.0, 8.0, 9.0, 9.0]])
    expected = naive_roi_align(features, rois, 3, 0.25, 2)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()

    empty = torch.empty(0)
    output = torch.full_like(expected, torch.nan)
    options = (3, 3, 0.25, 2, 1, True)
    roi_align_forward(features.detach(), rois, output, empty, empty, *options)
    gradient = torch.zeros_like(features)
    roi_align_backward(weights, rois, empty, empty, gradient, *options)
    assert torch.allclose(output, expected, atol=1e-6)
    assert torch.allclose(gradient, features.grad, atol=1e-5)


def test_roi_align__bfloat16():
    features, rois = torch.randn(1, 2, 8, 8), torch.tensor([[0, 0.0, 0.0, 6.0, 6.0]])
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(1, 2, 2, 2, dtype=dtype)
        roi_align_forward(features.to(dtype), rois.to(dtype), out, out, out, 2, 2, 1.0, 2, 1, True)
        outputs.append(out.float())
    assert torch.allclose(*outputs, atol=0.05)


def test_roi_align__maximum_is_refused():
    with pytest.raises(MissingOperatorError, match="compile mmcv"):
        roi_align_forward(*[torch.zeros(1)] * 5, 1, 1, 1.0, 0, 0, True)


def test_provide_operators__nothing_to_do_without_mmcv(monkeypatch):
    monkeypatch.delitem(sys.modules, ops.EXTENSION, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert provide_operators() == "none"


def test_provide_operators__compiled_ones_are_used(monkeypatch):
    monkeypatch.setitem(sys.modules, ops.EXTENSION, ModuleType(ops.EXTENSION))
    assert provide_operators() == "compiled"


def test_provide_operators__broken_ones_say_why(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: x")

    monkeypatch.delitem(sys.modules, ops.EXTENSION, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(UserError, match=r"undefined symbol(.|\n)*--no-build-isolation"):
        provide_operators()


@needs_mm
@pytest.mark.mm
def test_provide_operators__mmcv_and_mmdet_import():
    """In a process of its own, as at the start of a tool."""
    code = (
        "import sys, downstream, torch, importlib.util\n"
        "from mmcv.ops import batched_nms, deform_conv2d, RoIAlign\n"
        "import mmdet.models\n"
        "from downstream.compat.operators import provide_operators\n"
        "if provide_operators() == 'compiled': sys.exit(0)\n"
        "assert importlib.util.find_spec('mmcv._ext').origin == 'torchvision'\n"
        "x = torch.randn(1, 2, 8, 8, requires_grad=True)\n"
        "RoIAlign(2, 1.0)(x, torch.tensor([[0, 1., 1., 6., 6.]])).sum().backward()\n"
        "assert abs(x.grad.sum() - 8) < 1e-4, x.grad.sum()\n"
        "boxes, scores = torch.tensor([[0., 0, 9, 9], [0, 0, 9, 8], [0, 0, 9, 9]]), torch.tensor([.5, .9, .7])\n"
        "kept, index = batched_nms(boxes, scores, torch.tensor([0, 0, 1]), dict(type='nms', iou_threshold=.5))\n"
        "assert index.tolist() == [1, 2], index\n"
        "try: deform_conv2d(x, torch.zeros(1, 18, 8, 8), torch.zeros(2, 2, 3, 3), 1, 1)\n"
        "except NotImplementedError as error: assert 'compile mmcv' in str(error), error\n"
        "else: sys.exit('no error')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
