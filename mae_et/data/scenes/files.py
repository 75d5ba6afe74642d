"""Generated scenes written to disk: as an image folder, or in the layout of COCO or ADE20K."""

import colorsys
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_et.data.scenes.painter import SCENE_CLASSES, STUFF_CLASSES, make_scene
from mae_et.errors import DataError, UserError

# Index of the first validation scene: no validation set overlaps a training set of the same seed.
VAL_FIRST_INDEX = 10_000_000
JPEG_QUALITY = 95

Progress = Callable[[Iterable[int]], Iterable[int]]


def split_indices(num_train: int, num_val: int) -> dict[str, range]:
    """Returns the scene indices of the two splits, "train" and "val". They never overlap.

    Raises:
        UserError: if a count is negative, or if num_train is above VAL_FIRST_INDEX.
    """
    if not 0 <= num_train <= VAL_FIRST_INDEX or num_val < 0:
        raise UserError(
            f"the numbers of training and validation scenes are {num_train} and {num_val}; set the first in "
            f"0..{VAL_FIRST_INDEX}, the second to 0 or more"
        )
    return {"train": range(num_train), "val": range(VAL_FIRST_INDEX, VAL_FIRST_INDEX + num_val)}


def mask_to_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """Returns COCO's uncompressed run lengths of a mask.

    Args:
        mask: [H, W] bool.
    Returns:
        {"counts": runs down the columns, in turn of False and True, False first, "size": [H, W]}.
    """
    flat = np.asarray(mask, bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate(([0], changes, [flat.size]))).tolist()
    return {"counts": [0, *counts] if flat[0] else counts, "size": list(mask.shape)}


def write_image_folder(
    out_dir: str | Path,
    num_images: int,
    image_size: tuple[int, int],
    seed: int,
    first_index: int = 0,
    split: str = "train",
    *,
    progress: Progress = iter,
) -> Path:
    """Writes scenes as out_dir/split/class_name/00000012.jpg, named by index.

    Args:
        out_dir: created if missing.
        num_images: number of scenes; ten consecutive ones hold every class once.
        image_size: (H, W) in px.
        seed: see make_scene.
        first_index: index of the first scene; VAL_FIRST_INDEX for a validation split.
        split: name of the folder below out_dir.
        progress: wraps the indices, for a progress bar.
    Returns:
        The folder of the split.
    Raises:
        UserError: if a size, index or seed is out of range.
        DataError: if a file cannot be written.
    """
    folder = Path(out_dir) / split
    for index in progress(range(first_index, first_index + num_images)):
        scene = make_scene(index, image_size, seed)
        _save_image(scene.image, folder / SCENE_CLASSES[scene.label] / f"{index:08d}.jpg")
    return folder


def write_coco(
    out_dir: str | Path,
    num_train: int,
    num_val: int,
    image_size: tuple[int, int],
    seed: int,
    *,
    progress: Progress = iter,
) -> Path:
    """Writes scenes in the layout of COCO 2017, for detection and instance segmentation.

    Files: {train,val}2017/000000000012.jpg and annotations/instances_{train,val}2017.json; category id = class + 1,
    masks as uncompressed RLE, area in mask pixels. A split of 0 scenes is left out.

    Args: as for write_image_folder; num_train and num_val are numbers of scenes.
    Returns:
        out_dir.
    Raises:
        UserError: if a size, count or seed is out of range.
        DataError: if a file cannot be written.
    """
    out = Path(out_dir)
    categories = [{"id": i, "name": name, "supercategory": "object"} for i, name in enumerate(SCENE_CLASSES, 1)]
    for split, indices in split_indices(num_train, num_val).items():
        if not indices:
            continue
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in progress(indices):
            scene = make_scene(index, image_size, seed)
            height, width = scene.image.shape[:2]
            name = f"{index:012d}.jpg"
            _save_image(scene.image, out / f"{split}2017" / name)
            images.append({"id": index, "file_name": name, "height": height, "width": width})
            for box, kind, mask in zip(scene.boxes.tolist(), scene.classes.tolist(), scene.masks, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": kind + 1,
                        "segmentation": mask_to_rle(mask),
                        "area": int(mask.sum()),
                        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                        "iscrowd": 0,
                    }
                )
        info = {"description": "generated demo scenes", "version": "1", "seed": seed}
        content = {"info": info, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
        _save_json(content, out / "annotations" / f"instances_{split}2017.json")
    return out


def write_ade20k(
    out_dir: str | Path,
    num_train: int,
    num_val: int,
    image_size: tuple[int, int],
    seed: int,
    *,
    progress: Progress = iter,
) -> Path:
    """Writes scenes in the layout of ADE20K, for semantic segmentation.

    Files: images/{training,validation}/00000012.jpg, annotations/{training,validation}/00000012.png (uint8, 0 for
    unlabelled as in ADE20K: read with reduce_zero_label) and classes.json, where value v is classes[v - 1].

    Args: as for write_coco.
    Returns:
        out_dir.
    Raises:
        UserError: if a size, count or seed is out of range.
        DataError: if a file cannot be written.
    """
    out = Path(out_dir)
    folders = {"train": "training", "val": "validation"}
    for split, indices in split_indices(num_train, num_val).items():
        for index in progress(indices):
            scene = make_scene(index, image_size, seed)
            _save_image(scene.image, out / "images" / folders[split] / f"{index:08d}.jpg")
            _save_image(scene.semantic_map, out / "annotations" / folders[split] / f"{index:08d}.png")
    names = SCENE_CLASSES + STUFF_CLASSES
    colours = [[int(255 * c) for c in colorsys.hsv_to_rgb(i * 0.381966 % 1.0, 0.65, 0.9)] for i in range(len(names))]
    _save_json({"classes": list(names), "palette": colours, "reduce_zero_label": True}, out / "classes.json")
    return out


def _save_image(pixels: np.ndarray, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=JPEG_QUALITY)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; check free space and permissions"
        ) from error


def _save_json(content: dict[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; check free space and permissions"
        ) from error
