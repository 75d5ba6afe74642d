"""ONNX files of trained models: the backbone of a detector, with or without its neck, and whole segmentors.

Shapes: N images, C channels, H x W px, K classes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from downstream import run
from downstream.backbones.attention import is_exporting
from downstream.backbones.plain_vit import PlainViT
from downstream.backbones.timm_features import TimmFeatures
from downstream.trained import build_model, preparation
from mae_et.errors import CheckpointError, UserError
from mae_et.models.sizes import Size, as_size, plain_size, size_text
from mae_et.storage.onnx_program import OnnxFile, Sizes, check_request, write_onnx

log = logging.getLogger(__name__)

PARTS = ("backbone", "neck", "segmentor")
STRIDE = 32  # px, of the smallest map of backbones with stages


def export_dense(
    source: str | Path,
    path: str | Path,
    *,
    config_path: str | Path | None = None,
    overrides: Sequence[str] | None = None,
    part: str | None = None,
    image_size: int | Size | None = None,
    dynamic: str = "batch",
) -> OnnxFile:
    """Writes a part of a trained detector or segmentor and compares the file with it in onnxruntime.

    The input `images` is normalised; the metadata has mean, std and the order of the channels. The outputs are `map_0`, ... of
    a backbone, `level_0`, ... of a neck, or `logits` [N, K, H, W] of a segmentor.

    Args:
        source: a checkpoint of `mae-et train`, or its work dir: then the newest checkpoint.
        path: of the file, `.onnx`.
        config_path, overrides: as for `read_config`; None: the config in the work dir.
        part: "backbone", "neck" (the backbone and its neck) or "segmentor"; None: the backbone of a detector, or a whole
            segmentor.
        image_size: px, side or (H, W); None: the windows of a segmentor that slides, else `img_size` of a plain ViT.
        dynamic: as for `write_onnx`.
    Raises:
        UserError: if a package is missing, an argument does not fit the model, the model cannot be exported, or
            onnxruntime computes something else.
        CheckpointError: if there is no checkpoint, or it does not fit the config.
    """
    path = Path(path)
    check_request(path, dynamic)
    checkpoint, config_path = _located(Path(source), config_path)
    config = run.read_config(config_path, overrides)
    run.prepare(config)
    model, class_names = build_model(config, checkpoint, torch.device("cpu"))
    is_segmentor = config.default_scope == "mmseg"
    part = part or ("segmentor" if is_segmentor else "backbone")
    _check_part(model, part, is_segmentor)
    sizes = _sizes(model, image_size, dynamic)
    module = _Part(model, part).eval()
    metadata, channels = _metadata(config, model)
    with torch.no_grad():
        found = module(torch.zeros(1, channels, *sizes.size))
    outputs = ["logits"]
    if part != "segmentor":
        outputs = [f"{'map' if part == 'backbone' else 'level'}_{i}" for i in range(len(found))]
        metadata["strides"] = json.dumps([_stride(sizes, x) for x in found])
    elif (model.test_cfg or {}).get("mode") == "slide":
        log.warning(
            "the file computes whole images; the config slides windows of %s px (model.test_cfg): cut images into such windows, "
            "and average their logits, for the same masks",
            size_text(as_size(model.test_cfg["crop_size"])),
        )
    metadata |= {
        "layout": "onnx",
        "part": part,
        "source": checkpoint.name,
        "config": Path(config_path).name,
        "class_names": json.dumps(class_names),
        "image_size": json.dumps(plain_size(sizes.size)),
        **({"size_step": str(sizes.step), "least_size": str(sizes.least)} if dynamic == "size" else {}),
    }
    return write_onnx(
        module, path, channels=channels, sizes=sizes, dynamic=dynamic, outputs=outputs, metadata=metadata,
        where=str(checkpoint),
    )  # fmt: skip


class _Part(nn.Module):
    """A part of a model as a function of normalised images."""

    def __init__(self, model: Any, part: str) -> None:
        super().__init__()
        self.backbone, self.neck = model.backbone, model.neck if part == "neck" else None
        self.segmentor = model if part == "segmentor" else None
        for module in self.modules():
            if type(module) is nn.AdaptiveAvgPool2d:
                module.__class__ = TraceablePool

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.segmentor is not None:
            return self.segmentor.encode_decode(images, [{"img_shape": images.shape[2:]}])
        maps = self.backbone(images)
        return tuple(maps if self.neck is None else self.neck(maps))


class TraceablePool(nn.AdaptiveAvgPool2d):
    """Traces adaptive pooling as two products with matrices of averages; ONNX has no such operator for free sizes."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, C, *output_size]."""
        if not is_exporting():
            return super().forward(x)
        rows, columns = self.output_size if isinstance(self.output_size, tuple) else (self.output_size,) * 2
        down, across = averages(x.shape[2], rows or x.shape[2]), averages(x.shape[3], columns or x.shape[3])
        return down @ x @ across.T


def averages(size: int, bins: int) -> Tensor:
    """Returns [bins, size]: row i averages the positions that AdaptiveAvgPool pools into bin i."""
    index, position = torch.arange(bins)[:, None], torch.arange(size)
    inside = (position >= index * size // bins) & (position < ((index + 1) * size + bins - 1) // bins)
    return inside.float() / inside.float().sum(dim=1, keepdim=True)


def _located(source: Path, config: str | Path | None) -> tuple[Path, str | Path]:
    """Returns the checkpoint and the config of a training."""
    if not source.exists():
        raise CheckpointError(f"no such checkpoint or work dir: {source}")
    checkpoint = run.newest_checkpoint(source) if source.is_dir() else source
    if checkpoint is None:
        raise CheckpointError(f"{source} holds no checkpoint of `mae-et train` (epoch_*.pth or iter_*.pth)")
    if config is not None:
        return checkpoint, config
    beside = sorted(checkpoint.parent.glob("*.py"))
    if len(beside) != 1:
        names = ", ".join(path.name for path in beside) or "none"
        raise UserError(f"the config of {checkpoint} is not known (configs beside it: {names}): give it with --config")
    return checkpoint, beside[0]


def _check_part(model: Any, part: str, is_segmentor: bool) -> None:
    if part not in PARTS:
        raise UserError(f"part = {part!r} must be one of {', '.join(PARTS)}")
    name = type(model).__name__
    if part == "segmentor" and not is_segmentor:
        raise UserError(
            f"part = 'segmentor', but {name} is a detector, whose proposals and NMS are not exported: use backbone or neck"
        )
    if part == "segmentor" and not hasattr(model, "encode_decode"):
        raise UserError(f"{name} has no logits of whole images (encode_decode): use part backbone")
    if part == "neck" and not getattr(model, "with_neck", False):
        raise UserError(f"part = 'neck', but {name} has none: use backbone")


def _sizes(model: Any, image_size: int | Size | None, dynamic: str) -> Sizes:
    """Returns the sizes that a model takes."""
    backbone, step = model.backbone, STRIDE
    least = 2 * step
    if isinstance(backbone, PlainViT):
        step = backbone.patch_size
        # A window larger than the grid is shortened, which a graph cannot do.
        least = max(4, getattr(backbone, "window_size", 0) + 1) * step
    elif isinstance(backbone, TimmFeatures):
        step = math.lcm(STRIDE, backbone.multiple)
        least = 2 * step
    if image_size is None:
        image_size = _default_size(model)
    height, width = as_size(image_size)
    if dynamic == "size" and (height % step or width % step or min(height, width) < least):
        raise UserError(
            f"image_size = {size_text((height, width))} px does not fit a file of free size: with {type(backbone).__name__}, "
            f"height and width are multiples of {step} px, and {least} px or more. Choose such a size, or --dynamic batch"
        )
    if min(height, width) < step:
        raise UserError(f"image_size = {size_text((height, width))} px must be {step} px or more for each side")
    return Sizes((height, width), step, least)


def _default_size(model: Any) -> int | Size:
    test = getattr(model, "test_cfg", None) or {}
    if test.get("mode") == "slide":
        return as_size(test["crop_size"])
    if isinstance(model.backbone, PlainViT):
        rows, columns = model.backbone.grid_size
        return rows * model.backbone.patch_size, columns * model.backbone.patch_size
    raise UserError(
        f"{type(model.backbone).__name__} has no size of its own: give --image-size, e.g. the size that the test pipeline "
        "resizes and pads images to"
    )


def _stride(sizes: Sizes, found: Tensor) -> int:
    """Returns the stride of a map, px: the step of the sizes times a power of 2. The sides of maps are rounded."""
    ratio = max(side / own for side, own in zip(sizes.size, found.shape[2:], strict=True))
    return round(sizes.step * 2.0 ** round(math.log2(ratio / sizes.step)))


def _metadata(config: Config, model: Any) -> tuple[dict[str, str], int]:
    """Returns how images are prepared, as metadata, and the number of channels."""
    prepared = preparation(config, model)
    backbone = model.backbone
    metadata = {
        "architecture": f"{type(model).__name__}, {getattr(backbone, 'model_name', type(backbone).__name__)}",
        "in_chans": str(prepared.num_channels),
        "channel_order": prepared.channel_order,
        "mean": json.dumps(prepared.mean),
        "std": json.dumps(prepared.std),
        "pad_size_divisor": str(int(getattr(model.data_preprocessor, "pad_size_divisor", 1))),
        "test_pipeline": json.dumps(prepared.steps, default=str),
    }
    if prepared.value_range is not None:
        metadata["value_range"] = json.dumps(prepared.value_range)
    if isinstance(backbone, PlainViT):
        sizes: Mapping[str, int] = {
            "embed_dim": backbone.embed_dim, "depth": backbone.depth, "num_heads": backbone.num_heads,
            "patch_size": backbone.patch_size,
        }  # fmt: skip
        metadata |= {key: str(value) for key, value in sizes.items()}
    return metadata, prepared.num_channels
