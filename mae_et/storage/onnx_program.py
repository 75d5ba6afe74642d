"""Writes any model as an ONNX file and compares the file with the model in onnxruntime.

Shapes: N images, C channels, H x W px.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_et.errors import UserError
from mae_et.models.sizes import Size
from mae_et.storage.atomic import atomic_path, first_line

DYNAMIC = ("none", "batch", "size")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_FILE = 2**31 - 2**27  # bytes; protobuf holds 2 GiB
TOLERANCE = 1e-4  # of the largest output; float32 sums in another order differ by 1e-6 to 1e-5


@dataclass(frozen=True)
class Sizes:
    """The sizes that a model takes.

    Args:
        size: (H, W), px, of a file with a fixed size.
        step: px; with a free size, height and width are multiples of it.
        least: px; with a free size, the least height and width, a multiple of `step`.
    """

    size: Size
    step: int = 1
    least: int = 1


@dataclass(frozen=True)
class OnnxFile:
    """What was written.

    Args:
        metadata: of the file, as in its `metadata_props`.
        input_shape: numbers, and names of free dimensions.
        outputs: name -> shape, in order.
        difference: largest absolute difference between onnxruntime and torch, over all compared inputs and outputs.
    """

    metadata: dict[str, str]
    input_shape: list[int | str]
    outputs: dict[str, list[int | str]]
    difference: float


def check_request(path: Path, dynamic: str) -> None:
    """Checks what can be checked before a model is built.

    Raises:
        UserError: if a package is missing, or an argument is wrong.
    """
    if path.suffix != ".onnx":
        raise UserError(f"{path}: a file in layout 'onnx' must end in .onnx")
    if dynamic not in DYNAMIC:
        raise UserError(f"dynamic = {dynamic!r} must be one of {', '.join(DYNAMIC)}")
    if absent := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"layout 'onnx' needs {', '.join(absent)}: pip install 'mae_et[onnx]'")


def write_onnx(
    model: nn.Module,
    path: Path,
    *,
    channels: int,
    sizes: Sizes,
    dynamic: str,
    outputs: Sequence[str],
    metadata: Mapping[str, str],
    where: str,
) -> OnnxFile:
    """Writes a model, and compares the file with it on random images in onnxruntime.

    Args:
        model: in eval mode: `images` [N, C, H, W] -> a tensor, or a tuple of tensors.
        path: of the file, `.onnx`. It is absent unless everything is equal.
        channels: C.
        sizes: that the model takes.
        dynamic: "none": one image of H x W; "batch": any number of images; "size": also any height and width.
        outputs: names.
        metadata: of the file.
        where: the source, for messages.
    Raises:
        UserError: if the model cannot be exported, or onnxruntime computes something else.
    """
    if (num_bytes := sum(x.numel() * x.element_size() for x in model.state_dict().values())) > LARGEST_FILE:
        raise UserError(
            f"{where} has {num_bytes / 2**30:.1f} GiB of weights, and one ONNX file holds 2 GiB: export a smaller model"
        )
    program = _traced(model, channels, sizes, outputs, dynamic, where)
    for key, value in metadata.items():
        program.model.metadata_props[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        with _quiet():
            program.save(temporary, external_data=False)
        difference = _difference(model, temporary, _compared(channels, sizes, dynamic), where)
    graph = program.model.graph
    shapes = {name: _shape(value) for name, value in zip(outputs, graph.outputs, strict=True)}
    return OnnxFile(dict(metadata), _shape(graph.inputs[0]), shapes, difference)


def _compared(channels: int, sizes: Sizes, dynamic: str) -> Iterator[Tensor]:
    """Yields random images of the shapes that are compared."""
    height, width = sizes.size
    shapes = [(1 if dynamic == "none" else 2, height, width)]
    if dynamic != "none":
        shapes.append((3, height, width))
    if dynamic == "size":
        step = _between(sizes)
        shapes[1:] = [(3, height, width), (1, height + step, width + 2 * step), (1, sizes.least, sizes.least)]
    for seed, (num, rows, columns) in enumerate(dict.fromkeys(shapes)):
        yield torch.randn(num, channels, rows, columns, generator=torch.Generator().manual_seed(seed))


def _between(sizes: Sizes) -> int:
    """Returns a difference of two valid sizes that changes the grid of any model, px."""
    return sizes.step if sizes.step > 1 else 32


def _traced(model: nn.Module, channels: int, sizes: Sizes, outputs: Sequence[str], dynamic: str, where: str) -> Any:
    """Returns torch's ONNX program of a model."""
    (height, width), free = sizes.size, dict[int, Any]()
    if dynamic != "none":
        free[0] = torch.export.Dim("batch")
    if dynamic == "size":
        # Sizes that the model has no table for: a branch for a known size would fix the graph to that size.
        height, width = height + _between(sizes), width + 2 * _between(sizes)
        names = ("rows", "columns") if sizes.step > 1 else ("height", "width")
        for axis, name in enumerate(names, 2):
            free[axis] = sizes.step * torch.export.Dim(name, min=max(1, sizes.least // sizes.step))
    images = torch.randn(1 if dynamic == "none" else 2, channels, height, width)
    try:
        with _quiet(), torch.no_grad():
            return torch.onnx.export(
                model, (images,), dynamo=True, input_names=["images"], output_names=list(outputs),
                dynamic_shapes=(free,) if free else None, verbose=False,
            )  # fmt: skip
    except Exception as error:
        # The exporter wraps errors of many kinds; the last cause names the operator or the dimension.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        hint = {
            "none": "this model cannot be exported",
            "batch": "use --dynamic none",
            "size": "use --dynamic batch and --image-size",
        }
        raise UserError(f"{where} cannot be exported to ONNX ({first_line(cause)}): {hint[dynamic]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the exporter prints and logs about its progress and its own internals."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _difference(model: nn.Module, path: Path, inputs: Iterator[Tensor], where: str) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    largest = 0.0
    for images in inputs:
        with torch.no_grad():
            expected = model(images)
        expected = (expected,) if isinstance(expected, Tensor) else expected
        try:
            computed = session.run(None, {"images": images.numpy()})
        except Exception as error:  # onnxruntime raises classes of its own
            raise UserError(
                f"{where}: onnxruntime cannot run the file on images of {tuple(images.shape)} ({first_line(error)}), so it is "
                "not written: use --dynamic none"
            ) from error
        for ours, theirs in zip(expected, computed, strict=True):
            difference = float("inf")
            if tuple(ours.shape) == theirs.shape:
                difference = float((torch.from_numpy(theirs) - ours).abs().max())
            if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
                raise UserError(
                    f"{where}: onnxruntime differs from torch by {difference:.2g} on images of {tuple(images.shape)}, so the "
                    "file is not written. Report this model together with the versions of torch and onnxruntime"
                )
            largest = max(largest, difference)
    return largest


def _shape(value: Any) -> list[int | str]:
    return [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
