"""Draws the reconstructions of a masked autoencoder, one picture for each image with a row for each bandwidth."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mae_et.data.arrays import ImageArray, decode
from mae_et.data.decoding import BadImageError, Decoding
from mae_et.data.sources.shard_names import is_shard_name
from mae_et.data.sources.spec import open_source
from mae_et.data.sources.table import is_table
from mae_et.data.transforms import EvalTransform
from mae_et.errors import DataError, UserError
from mae_et.evaluation.drawing import Drawing
from mae_et.evaluation.pictures import ladder, save_picture
from mae_et.models.masks import RANDOM_MASKS, recorded_masks
from mae_et.models.sizes import Size, plain_size, recorded_size, size_at, size_text
from mae_et.runs.folder import spread
from mae_et.storage.atomic import atomic_path
from mae_et.storage.backbone import load_mae
from mae_et.storage.metadata import stored_range
from mae_et.storage.weights import find_weights
from mae_et.tasks.features import normalisation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReconstructOptions:
    """Options of `draw_reconstructions`. The defaults None are the values of the run that the checkpoint is from."""

    bandwidth: Sequence[int] | None = (
        None  # px, of the shorter side; where unknown: about 3/7, 5/7 and all of the image size
    )
    mask_ratio: float | None = None  # fraction of the patches that is removed; where unknown: 0.75
    seed: int = 0  # of the masks
    max_images: int = 8  # of each source, evenly spread
    image_size: int | Size | None = None  # px, side or (H, W); where unknown: 224
    tile: int = 192  # px, side of each picture
    channels: Sequence[int] | None = None  # one or three to draw; None: the first three, or the first of one or two
    norm_pix: bool | None = None  # whether the model predicts normalised patches; needed where the file does not say
    num_heads: int | None = None  # needed only where the file does not give it and the width is not a published one
    decoder_num_heads: int | None = None  # likewise

    def __post_init__(self) -> None:
        for name, low in (("max_images", 1), ("tile", 16)):
            if getattr(self, name) < low:
                raise UserError(f"{name} = {getattr(self, name)} must be {low} or more")
        if self.mask_ratio is not None and not 0 <= self.mask_ratio < 1:
            raise UserError(f"mask_ratio = {self.mask_ratio} must be at least 0 and below 1")


def draw_reconstructions(
    checkpoint: Path, images: Sequence[str], out: Path, options: ReconstructOptions, device: str | None = None
) -> dict[str, Any]:
    """Draws the input, the masked input and the reconstruction of images at several bandwidths.

    Args:
        checkpoint: a run's folder (its newest checkpoint is used), or a file of a model with its decoder.
        images: image files, and sources as in mae_et/data/sources/spec.py.
        out: a folder without earlier pictures of this function. It gets a PNG file for each image and
            reconstructions.json.
        options: what to draw.
        device: "cpu" or "cuda"; None: CUDA where there is one.
    Returns:
        The content of reconstructions.json.
    Raises:
        UserError: if an option is wrong, or the folder holds earlier pictures.
        CheckpointError: if the file holds no MAE with its decoder.
        DataError: if none of the images can be read.
    """
    record_path = out / "reconstructions.json"
    if record_path.exists():
        raise UserError(f"{out} holds reconstructions already ({record_path.name}): remove it or choose another --out")
    path = find_weights(checkpoint, with_decoder=True)
    model, metadata = load_mae(
        path,
        options.image_size,
        num_heads=options.num_heads,
        decoder_num_heads=options.decoder_num_heads,
        norm_pix_loss=options.norm_pix,
    )
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    patch_size = model.patch_size
    image_size = model.grid_size[0] * patch_size, model.grid_size[1] * patch_size
    bandwidths = options.bandwidth or default_bandwidths(metadata, image_size, patch_size)
    for bandwidth in bandwidths:
        if not patch_size <= bandwidth <= min(image_size) or bandwidth % patch_size:
            raise UserError(
                f"bandwidth {bandwidth} must be a multiple of the patch size {patch_size} and at most "
                f"{'the image size' if image_size[0] == image_size[1] else 'the shorter side of the image size'} "
                f"{size_text(image_size)}"
            )
    sizes = [size_at(bandwidth, image_size, patch_size) for bandwidth in bandwidths]
    mean, std = normalisation(metadata, model.in_chans)
    Drawing(mean, std, stored_range(metadata) is not None, options.channels)  # refuses channels that do not exist
    ratio = float(metadata.get("mask_ratio", 0.75)) if options.mask_ratio is None else options.mask_ratio
    masks = recorded_masks(metadata)
    if masks.kind == "grid" and options.mask_ratio is not None and options.mask_ratio != float(metadata["mask_ratio"]):
        masks = RANDOM_MASKS
        log.info("%s was trained with grid masks, which fit its own mask ratio only: drawing random masks", path)
    centered = bool(json.loads(metadata.get("curriculum", "{}")).get("centered", True))
    transform = EvalTransform(image_size, float(metadata.get("eval_crop_ratio", 0.875)))
    run = f"{path.parent.parent.name}/" if path.name.startswith("step_") else ""

    number = 0
    for name, load in _wanted_images(images, model.in_chans, stored_range(metadata), options.max_images):
        try:
            pixels = transform(load())
        except BadImageError as error:
            log.warning("left out %s: %s", name, error)
            continue
        title = f"{Path(name).name}   ({run}{path.name})"
        picture = ladder(
            model,
            pixels,
            sizes,
            mean,
            std,
            ratio,
            centered,
            options.seed,
            title,
            options.tile,
            masks,
            options.channels,
        )
        stem = re.sub(r"[^\w.-]+", "_", Path(name).stem)[:80]
        save_picture(picture, out / f"{number:03d}_{stem}.png")
        number += 1
    if not number:
        raise DataError("none of the images can be read; the reasons are above")
    record = {
        "checkpoint": str(checkpoint),
        "file": str(path),
        "encoder_sha256": metadata.get("encoder_sha256"),
        "target": "HOG descriptors" if model.target == "hog" else f"{'normalised ' * model.norm_pix_loss}pixels",
        "bandwidths": list(map(plain_size, sizes)),
        "mask_ratio": ratio,
        "mask_kind": masks.kind,
        "mask_grid": masks.square,
        "channels": options.channels and list(options.channels),
        "seed": options.seed,
        "num_pictures": number,
    }
    with atomic_path(record_path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def default_bandwidths(metadata: Mapping[str, str], image_size: Size, patch_size: int) -> list[int]:
    """Returns the bandwidths of the run, or three bandwidths where they are unknown or of another image size."""
    if "image_size" in metadata and recorded_size(metadata) == image_size and "bandwidths" in metadata:
        return sorted(set(json.loads(metadata["bandwidths"])))
    return sorted({max(1, round(min(image_size) * share / patch_size)) * patch_size for share in (3 / 7, 5 / 7, 1)})


def _wanted_images(
    words: Sequence[str], num_channels: int, value_range: tuple[float, float] | None, max_images: int
) -> Iterator[tuple[str, Callable[[], Image.Image | ImageArray]]]:
    """Yields the name and a decoding function of each image to draw.

    Raises:
        DataError: before the first image, if a word names no images.
    """
    opened = [
        word
        if Path(word).expanduser().is_file() and not (is_shard_name(word) or is_table(word))
        else open_source(word, num_channels, value_range=value_range)
        for word in words
    ]
    for source in opened:
        if isinstance(source, str):
            decoding = Decoding(num_channels, value_range, dtype="uint8" if value_range is None else "float32")
            yield source, partial(decode, Path(source).expanduser(), decoding)
        else:
            for i in spread(len(source), max_images).tolist():
                yield source.name(i), partial(source.load, i)
