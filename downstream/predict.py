"""Predictions of a detector or segmentor on images: COCO JSON, masks as PNG, pictures.

The model, its weights and the preparation of the images are those of `tools/test.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from PIL import Image
from tqdm import tqdm

from downstream import run
from downstream.trained import build_model, preparation, test_steps
from mae_et.data.decoding import BadImageError
from mae_et.data.sources.named_files import open_files
from mae_et.errors import DataError
from mae_et.evaluation.annotate import COLORS, with_boxes, with_classes
from mae_et.evaluation.drawing import Drawing
from mae_et.runs.output import open_output, picture_name
from mae_et.tasks.predict import JSON_FILE, PICTURES, check_drawn, report_bad_images, write_json

log = logging.getLogger(__name__)

MASKS = "masks"


def predict_dense(
    config_path: str | Path,
    overrides: Sequence[str] | None,
    checkpoint: str | Path,
    images: Sequence[str],
    out: Path,
    *,
    pictures: bool = False,
    score: float = 0.3,
    overwrite: bool = False,
    device: str | None = None,
    channels: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Applies a detector or segmentor to images with the test pipeline of its config.

    Args:
        config_path, overrides: as for `read_config`.
        checkpoint: of a training run.
        images: files, folders and glob patterns.
        out: a folder that gets predictions.json; a segmentor's also gets masks/.
        pictures: draw the predictions into pictures/.
        score: lowest score of a detection that is drawn; predictions.json has all detections.
        overwrite: replace earlier results in `out`.
        device: "cpu" or "cuda"; None: CUDA where there is one.
        channels: one or three to draw; see `Drawing`.
    Returns:
        The content of predictions.json. COCO's `images`, `categories` and, for a detector, `annotations` with scores.
    Raises:
        CheckpointError: if the checkpoint does not fit the config, or has no class names.
        DataError: if there are no images, or none can be read.
        UserError: if `out` is not empty.
    """
    config = run.read_config(config_path, overrides)
    run.prepare(config)
    check_drawn(pictures, channels)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, names = build_model(config, checkpoint, target)
    pipeline, prepared = Compose(test_steps(config)), preparation(config, model)
    source = open_files(images, prepared.num_channels, prepared.value_range)
    # Images of a source have the order RGB, those of the libraries often BGR.
    mean, std = (values[:: -1 if prepared.channel_order == "BGR" else 1] for values in (prepared.mean, prepared.std))
    drawing = Drawing(mean, std, prepared.value_range is not None, channels)
    is_segmentor = config.default_scope == "mmseg"
    open_output(out, overwrite, (JSON_FILE, PICTURES, MASKS))
    record: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "categories": [{"id": i if is_segmentor else i + 1, "name": name} for i, name in enumerate(names)],
        "images": [],
    }
    if not is_segmentor:
        record["annotations"] = []
    bad_images: dict[int, str] = {}
    for i in tqdm(range(len(source)), unit="image", desc="predict", disable=None):
        try:
            loaded = source.load(i)  # the readers of mmcv give a reason for few faults only
        except BadImageError as error:
            bad_images[i] = str(error)
            continue
        try:
            data = pipeline({"img_path": source.paths[i], "img_id": i, "reduce_zero_label": False, "seg_fields": []})
        except (DataError, OSError, AssertionError, AttributeError, TypeError, ValueError) as error:
            bad_images[i] = f"the test pipeline cannot read it: {error}"
            continue
        with torch.inference_mode():
            result = model.test_step(pseudo_collate([data]))[0]
        height, width = result.ori_shape[:2]
        if (width, height) != (loaded.width, loaded.height):  # boxes and masks would be drawn at other places
            size = loaded.width, loaded.height
            log.warning("%s: the pipeline reads %d x %d px, not %d x %d", source.name(i), width, height, *size)
        image = drawing.image(loaded).resize((width, height)) if pictures else None
        entry: dict[str, Any] = {"id": i, "file_name": source.name(i), "height": height, "width": width}
        record["images"].append(entry)
        name = picture_name(i, source.name(i))
        if is_segmentor:
            classes = result.pred_sem_seg.data[0].cpu().numpy()
            counts = np.bincount(classes.ravel(), minlength=len(names))
            entry["mask"] = f"{MASKS}/{name}"
            entry["pixels"] = {names[j]: int(counts[j]) for j in counts.nonzero()[0]}
            _save_mask(classes, len(names), out / MASKS / name)
            drawn = with_classes(image, classes, names) if image else None
        else:
            found = _annotations(result.pred_instances, i, len(record["annotations"]))
            record["annotations"] += found
            drawn = _with_detections(image, found, names, score) if image else None
        if drawn is not None:
            (out / PICTURES).mkdir(exist_ok=True)
            drawn.save(out / PICTURES / name)
    report_bad_images(source, bad_images)
    record["bad_images"] = [{"image": source.name(i), "reason": bad_images[i]} for i in bad_images]
    write_json(record, out / JSON_FILE)
    return record


def _annotations(instances: Any, image_id: int, first: int) -> list[dict[str, Any]]:
    """Returns detections in COCO format, most certain first."""
    boxes = instances.bboxes.cpu().double().tolist()
    labels, scores = instances.labels.cpu().tolist(), instances.scores.cpu().tolist()
    found: list[dict[str, Any]] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        x1, y1, x2, y2 = boxes[i]
        one: dict[str, Any] = {
            "id": first + len(found) + 1,
            "image_id": image_id,
            "category_id": labels[i] + 1,
            "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
            "area": round((x2 - x1) * (y2 - y1), 2),
            "iscrowd": 0,
            "score": round(scores[i], 5),
        }
        if "masks" in instances:
            one |= _mask(instances.masks[i].cpu().numpy())
        found.append(one)
    return found


def _mask(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask, np.uint8))
    return {
        "area": int(mask.sum()),
        "segmentation": {"size": list(map(int, encoded["size"])), "counts": encoded["counts"].decode("ascii")},
    }


def _with_detections(
    image: Image.Image, found: Sequence[Mapping[str, Any]], names: Sequence[str], score: float
) -> Image.Image:
    shown = [one for one in found if one["score"] >= score]
    boxes = [(x, y, x + width, y + height) for x, y, width, height in (one["bbox"] for one in shown)]
    labels = [one["category_id"] - 1 for one in shown]
    texts = [f"{names[label]} {one['score']:.2f}" for label, one in zip(labels, shown, strict=True)]
    return with_boxes(image, boxes, labels, texts)


def _save_mask(classes: np.ndarray, num_classes: int, path: Path) -> None:
    """Writes class indices as pixel values; up to 256 classes with a palette, so that viewers show colours."""
    path.parent.mkdir(exist_ok=True)
    if num_classes > 256:
        Image.fromarray(classes.astype(np.uint16)).save(path)
        return
    picture = Image.fromarray(classes.astype(np.uint8), "P")
    picture.putpalette([value for i in range(256) for value in COLORS[i % len(COLORS)]])
    picture.save(path)
