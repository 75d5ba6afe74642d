"""Writes the features of every image of a data set to one file.

Shapes: N images, M of them readable, n images of a batch, C channels, H x W px, L patches, D width.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from mae_et.data.eval_loader import eval_loader
from mae_et.data.sources.source import ImageSource
from mae_et.data.sources.spec import open_source
from mae_et.data.stream import choose_num_workers, reading
from mae_et.engine.distributed import World, join_world
from mae_et.errors import DataError, UserError
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.cls_tokens import cls_feature
from mae_et.models.sizes import Size, as_size, plain_size, recorded_size, size_text
from mae_et.models.vit import random_vit, vit_from_state
from mae_et.storage.atomic import atomic_path
from mae_et.storage.backbone import read_backbone
from mae_et.storage.metadata import stored_range

log = logging.getLogger(__name__)

NUM_BAD_SHOWN = 5
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FeatureOptions:
    """Options of `extract`. The defaults of image_size, mean, std, value_range and crop_ratio (None) are the backbone's."""

    feature: str = "mean"  # of the tokens: "cls", "mean" (of the patches) or "patches"
    block: int | None = None  # use the raw output of this block; None: the tokens after the final norm
    dtype: str = "float32"  # of the file: "float32" or "float16"
    image_size: int | Size | None = None  # px, side or (H, W); where the backbone file does not give it: 224
    mean: Sequence[float] | None = None  # of pixels in [0, 1]; where the file does not give it: ImageNet's
    std: Sequence[float] | None = None
    value_range: tuple[float, float] | None = None  # stored values (black, white) of images that are not 8-bit
    crop_ratio: float | None = None  # share of the shorter side that is kept; where the file does not give it: 0.875
    batch_size: int = 64  # of each process
    num_workers: int | None = None  # loader processes of each process; None: from the cores
    precision: str = "fp32"  # of the network: "fp32", "bf16" or "fp16"
    num_heads: int | None = None  # needed only where the file does not give it and the width is not a published one
    size: str = "base"  # of a "random" backbone
    seed: int = 0  # of a "random" backbone

    def __post_init__(self) -> None:
        check_reading(self.batch_size, self.num_workers, self.image_size, self.crop_ratio)


def check_reading(
    batch_size: int, num_workers: int | None, image_size: int | Size | None, crop_ratio: float | None
) -> None:
    """Checks options of reading images; None stands for a default.

    Raises:
        UserError: naming the first option that is out of range.
    """
    for name, value, low in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value is not None and value < low:
            raise UserError(f"{name} = {value} must be {low} or more")
    if image_size is not None and min(as_size(image_size)) < 1:
        raise UserError(f"image_size = {size_text(image_size)} must be 1 or more")
    if crop_ratio is not None and not 0 < crop_ratio <= 1:
        raise UserError(f"crop_ratio = {crop_ratio} must be above 0 and at most 1")


def extract(
    backbone: str, data: str, out: Path, options: FeatureOptions, device: str | None = None
) -> dict[str, Any] | None:
    """Writes a feature file and a JSON file beside it that names its rows.

    Under torchrun the images are split over the processes. They write into one file, so all machines must share the
    folder of `out`. Memory use does not grow with the number of images, except for their names.

    Args:
        backbone: a backbone file or checkpoint, or "random" for untrained weights.
        data: the images; see mae_et/data/sources/spec.py.
        out: a new file; its suffix, .npy or .safetensors, sets the format.
        options: how to compute the features.
        device: "cpu" or "cuda"; None: CUDA where there is one.
    Returns:
        The content of the JSON file, and "seconds"; None except on the main process.
    Raises:
        UserError: if an argument is wrong, the files exist, or a feature is not finite.
        DataError: if none of the images can be read.
    """
    if out.suffix not in (".npy", ".safetensors"):
        raise UserError(f"{out}: the name of a feature file must end in .npy or .safetensors")
    for path in (out, out.with_suffix(".json")):
        if path.exists():
            raise UserError(f"{path} exists: remove it or choose another --out")
    with join_world(device) as world:
        return _extract(backbone, data, out, options, world)


def _extract(backbone: str, data: str, out: Path, options: FeatureOptions, world: World) -> dict[str, Any] | None:
    model, metadata = open_encoder(backbone, options)
    model = model.to(world.device).eval()
    size, channels = as_size(model.patch_embed.img_size), model.in_chans
    mean, std = normalisation(metadata, channels, options.mean, options.std)
    crop_ratio = float(metadata.get("eval_crop_ratio", 0.875)) if options.crop_ratio is None else options.crop_ratio
    tokens = feature_function(model, options.feature, options.block)
    dtype = PRECISIONS[options.precision]

    @torch.inference_mode()
    def features(images: Tensor) -> np.ndarray:
        with torch.autocast(world.device.type, dtype, enabled=dtype is not None):
            return tokens(crop_and_normalize(images.to(world.device, non_blocking=True), size, mean, std)).cpu().numpy()

    source = open_source(data, channels, value_range=options.value_range or stored_range(metadata))
    partial = out.with_name(f".{out.name}.partial")
    start = time.monotonic()
    shape = features(torch.zeros(1, channels, *size, dtype=torch.uint8)).shape[1:]
    world.barrier()  # every process has looked for existing files before the main one writes
    try:
        if world.is_main:
            out.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(partial, "w+", np.dtype(options.dtype), (len(source), *shape))
        world.barrier()
        bad_images = _write_share(features, source, size, crop_ratio, options, partial, world)
        if not world.is_main:
            return None
        index = {
            "backbone": backbone,
            "encoder_sha256": metadata.get("encoder_sha256"),
            "data": data,
            "feature": options.feature,
            "block": options.block,
            "image_size": plain_size(size),
            "crop_ratio": crop_ratio,
            "mean": mean,
            "std": std,
            "value_range": source.decoding.value_range,
            "precision": options.precision,
            "dtype": options.dtype,
        }
        return _finish(index, source, bad_images, partial, out) | {"seconds": time.monotonic() - start}
    finally:
        if world.is_main:
            with contextlib.suppress(OSError):
                partial.unlink()


def open_encoder(backbone: str, options: FeatureOptions) -> tuple[VisionTransformer, Mapping[str, str]]:
    """Builds the encoder; returns it with the metadata of its file."""
    # The output of a block needs no final norm, and a classifier on the mean of the patches has none.
    pool = "token" if options.block is None else "avg"
    metadata: Mapping[str, str] = {}
    if backbone == "random":
        torch.manual_seed(options.seed)
        model = random_vit(options.image_size or 224, options.size, num_heads=options.num_heads, global_pool=pool)
    else:
        state, metadata = read_backbone(backbone)
        if options.block is None and "norm.weight" not in state and "fc_norm.weight" in state:
            raise UserError(
                f"{backbone} is a classifier on the mean of the patches and has no norm of its tokens: give --block -1"
            )
        size = options.image_size or recorded_size(metadata)
        model = vit_from_state(
            state, size, metadata=metadata, where=backbone, num_heads=options.num_heads, global_pool=pool
        )
    if options.block is not None and not -len(model.blocks) <= options.block < len(model.blocks):
        raise UserError(f"block {options.block} does not exist: the encoder has blocks 0 to {len(model.blocks) - 1}")
    return model, metadata


def normalisation(
    metadata: Mapping[str, str],
    channels: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[list[float], list[float]]:
    """Returns the mean and deviation to normalise pixels with.

    Args:
        metadata: of the backbone; used where mean or std is None. ImageNet's values replace what it lacks, averaged over
            the channels if the backbone does not take three.
        channels: C of the backbone.
        mean, std: C values that replace the backbone's.
    Raises:
        UserError: if a number of values is not C, or std is not above 0.
    """
    found = []
    for name, values, default in (("mean", mean, IMAGENET_DEFAULT_MEAN), ("std", std, IMAGENET_DEFAULT_STD)):
        if values is None and name in metadata:
            values = json.loads(metadata[name])
        elif values is None:
            values = default if channels == len(default) else [sum(default) / len(default)] * channels
        if len(values) != channels:
            raise UserError(
                f"{name} has {len(values)} values, but the backbone takes {channels} channels: give one for each"
            )
        found.append([float(value) for value in values])
    if min(found[1]) <= 0:
        raise UserError(f"std = {found[1]} must be above 0")
    return found[0], found[1]


def feature_function(model: VisionTransformer, feature: str, block: int | None) -> Callable[[Tensor], Tensor]:
    """Returns a function that computes features.

    Args:
        model: in eval mode.
        feature: "cls", "mean" or "patches".
        block: index of the block whose raw output is used; None: the tokens after the final norm.
    Returns:
        [n, C, H, W] normalised -> [n, D] float32, or [n, L, D] for "patches".
    """

    def compute(images: Tensor) -> Tensor:
        if block is None:
            tokens = model.forward_features(images)
        else:
            number = block % len(model.blocks)
            outputs: Any = model.forward_intermediates(
                images, [number], return_prefix_tokens=True, stop_early=True, output_fmt="NLC", intermediates_only=True
            )
            tokens = torch.cat([outputs[0][1], outputs[0][0]], dim=1)
        tokens = tokens.float()
        if feature == "cls":
            return cls_feature(model, tokens)
        patches = tokens[:, model.num_prefix_tokens :]
        return patches.mean(dim=1) if feature == "mean" else patches

    return compute


def _write_share(
    features: Callable[[Tensor], np.ndarray],
    source: ImageSource,
    image_size: Size,
    crop_ratio: float,
    options: FeatureOptions,
    path: Path,
    world: World,
) -> dict[int, str]:
    """Writes the features of this process's images to their rows of an npy file.

    Returns:
        Index -> reason of the unreadable images of all processes, whose rows stay zero.
    Raises:
        UserError: on every process, if a value of any process is not finite or too large for the file's type.
    """
    rows = np.lib.format.open_memmap(path, "r")
    row_bytes, offset = rows[0].nbytes, rows.offset
    own = world.share(np.arange(len(source)), options.batch_size)
    workers = choose_num_workers(options.num_workers, world.local_size, world.device.type == "cuda")
    loader = eval_loader(source, own, image_size, options.batch_size, workers, crop_ratio)
    bad_images: dict[int, str] = {}
    fault = ""
    bar = tqdm(total=len(own), unit="image", desc=path.name, disable=None if world.is_main else True)
    # Plain writes: with a memory map, two machines would overwrite each other's rows within a page of a network disk.
    with reading(loader) as batches, open(path, "r+b") as file, bar:
        for batch in batches:
            bad_images.update({image.index: image.reason for image in batch.bad_images})
            if len(batch.images):
                computed = features(batch.images)
                with np.errstate(over="ignore"):
                    stored = np.ascontiguousarray(computed, dtype=rows.dtype)
                if not np.isfinite(stored).all():
                    fault = "too large for float16" if np.isfinite(computed).all() else "not finite"
                    break
                for row, place in zip(stored, batch.places.tolist(), strict=True):
                    file.seek(offset + place * row_bytes)
                    file.write(row)
            bar.update(len(batch.labels) + len(batch.bad_images))
    if faults := [other for other in world.gather(fault) if other]:
        raise UserError(
            f"a feature is {faults[0]}: use --precision fp32 and --dtype float32; if that does not help, the backbone may be "
            "damaged"
        )
    return {index: reason for part in world.gather(bad_images) for index, reason in part.items()}


def _finish(
    index: dict[str, Any], source: ImageSource, bad_images: Mapping[int, str], partial: Path, out: Path
) -> dict[str, Any]:
    """Leaves out the rows of unreadable images and writes the feature file and the JSON file."""
    if len(bad_images) == len(source):
        raise DataError(f"none of the {len(source)} images can be read, e.g. {_some_bad(source, bad_images)}")
    used = np.setdiff1d(np.arange(len(source)), list(bad_images))
    if bad_images:
        log.warning("left out %d of %d images: %s", len(bad_images), len(source), _some_bad(source, bad_images))
    labels = None if source.labels is None else np.asarray(source.labels, np.int64)[used]
    rows = np.lib.format.open_memmap(partial, "r+")
    if bad_images:
        for place, row in enumerate(used):  # in place, so memory and disk do not grow
            rows[place] = rows[row]
    content = {
        **index,
        "shape": [len(used), *rows.shape[1:]],
        "class_names": None if source.class_names is None else list(source.class_names),
        "labels": None if labels is None else labels.tolist(),
        "names": [source.name(int(i)) for i in used],
        "bad_images": [{"name": source.name(i), "reason": bad_images[i]} for i in sorted(bad_images)],
    }
    with atomic_path(out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    with atomic_path(out) as temporary:
        if out.suffix == ".safetensors":
            arrays = {"features": rows[: len(used)]} | ({} if labels is None else {"labels": labels})
            notes = {key: json.dumps(value) for key, value in index.items()}
            safetensors.numpy.save_file(arrays, temporary, notes)
        elif bad_images:
            with open(temporary, "wb") as file:
                np.save(file, rows[: len(used)])
        else:
            os.replace(partial, temporary)
    return content


def _some_bad(source: ImageSource, bad_images: Mapping[int, str]) -> str:
    shown = [f"{source.name(i)} ({bad_images[i]})" for i in sorted(bad_images)[:NUM_BAD_SHOWN]]
    return "; ".join(shown) + ("; ..." if len(bad_images) > NUM_BAD_SHOWN else "")
