"""Predictions of a classifier on images: CSV, JSON and pictures.

Shapes: n images of a batch, K classes.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mae_et.data.decoding import BadImageError
from mae_et.data.eval_loader import eval_loader
from mae_et.data.sources.named_files import NamedFiles, open_files
from mae_et.data.sources.source import ImageSource
from mae_et.data.stream import choose_num_workers, reading
from mae_et.errors import DataError, UserError
from mae_et.evaluation.annotate import MAX_SIDE, with_bars
from mae_et.evaluation.drawing import Drawing
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.sizes import plain_size
from mae_et.runs.output import open_output, picture_name
from mae_et.storage.atomic import atomic_path
from mae_et.tasks.classifier_file import load_classifier
from mae_et.tasks.features import PRECISIONS

log = logging.getLogger(__name__)

CSV_FILE, JSON_FILE, PICTURES = "predictions.csv", "predictions.json", "pictures"
NUM_BAD_SHOWN = 5


@dataclass(frozen=True)
class PredictOptions:
    """Options of `predict`."""

    top_k: int = 5  # classes to write for each image; at most all
    batch_size: int = 64
    num_workers: int | None = None  # loader processes; None: from the cores
    precision: str = "fp32"  # of the network: "fp32", "bf16" or "fp16"
    pictures: bool = False  # draw each image with its most likely classes
    channels: Sequence[int] | None = None  # one or three to draw; None: the first three, or the first of one or two
    overwrite: bool = False  # replace earlier results in the output folder

    def __post_init__(self) -> None:
        for name, low in (("top_k", 1), ("batch_size", 1), ("num_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{name} = {value} must be {low} or more")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision = {self.precision!r} must be one of {', '.join(PRECISIONS)}")
        check_drawn(self.pictures, self.channels)


@torch.inference_mode()
def predict(
    checkpoint: str | Path,
    images: Sequence[str],
    out: Path,
    options: PredictOptions,
    class_names: Sequence[str] | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Classifies images as the evaluation of the run does: the same resizing, centre crop and normalisation.

    Args:
        checkpoint: a classifier.safetensors of `classify` or `supervised`, or the folder of the run.
        images: files, folders and glob patterns.
        out: a folder that gets predictions.csv, predictions.json and, if wanted, pictures/.
        options: how to predict.
        class_names: needed if the file records none.
        device: "cpu" or "cuda"; None: CUDA where there is one.
    Returns:
        The content of predictions.json.
    Raises:
        CheckpointError: if the file is no classifier.
        DataError: if there are no images, or none can be read.
        UserError: if an option is wrong, `out` is not empty, or an output is not finite.
    """
    classifier = load_classifier(checkpoint, class_names)
    source = open_files(images, classifier.in_chans, classifier.value_range)
    is_float = source.decoding.dtype == "float32"
    drawing = Drawing(classifier.mean, classifier.std, is_float, options.channels)
    open_output(out, options.overwrite, (CSV_FILE, JSON_FILE, PICTURES))
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, names = classifier.model.to(target), classifier.class_names
    dtype, k = PRECISIONS[options.precision], min(options.top_k, len(names))
    workers = choose_num_workers(options.num_workers, 1, target.type == "cuda")
    loader = eval_loader(
        source, range(len(source)), classifier.image_size, options.batch_size, workers, classifier.crop_ratio
    )
    rows: list[dict[str, Any]] = []
    bad_images: dict[int, str] = {}
    with reading(loader) as batches, tqdm(total=len(source), unit="image", desc="predict", disable=None) as bar:
        for batch in batches:
            bad_images.update({image.index: image.reason for image in batch.bad_images})
            if len(batch.images):
                pixels = batch.images.to(target, non_blocking=True)
                inputs = crop_and_normalize(pixels, classifier.image_size, classifier.mean, classifier.std)
                with torch.autocast(target.type, dtype, enabled=dtype is not None):
                    logits = model(inputs)
                logits = logits.float().cpu()
                if not logits.isfinite().all():
                    raise UserError(f"an output of {classifier.path} is not finite: use --precision fp32")
                top, shares = logits.topk(k, dim=1), logits.softmax(dim=1)
                for place, values, labels, share in zip(batch.places.tolist(), *top, shares, strict=True):
                    classes = [
                        {"label": i, "class": names[i], "probability": float(share[i]), "logit": float(value)}
                        for value, i in zip(values, labels.tolist(), strict=True)
                    ]
                    rows.append({"image": source.name(place), "top": classes})
                    if options.pictures:
                        _draw(drawing, source, place, classes, out / PICTURES)
            bar.update(len(batch.labels) + len(batch.bad_images))
    report_bad_images(source, bad_images)
    record = {
        "checkpoint": str(classifier.path),
        "class_names": names,
        "image_size": plain_size(classifier.image_size),
        "crop_ratio": classifier.crop_ratio,
        "mean": classifier.mean,
        "std": classifier.std,
        "precision": options.precision,
        "predictions": rows,
        "bad_images": [{"image": source.name(i), "reason": bad_images[i]} for i in sorted(bad_images)],
    }
    write_json(record, out / JSON_FILE)
    _write_csv(rows, k, out / CSV_FILE)
    return record


def check_drawn(pictures: bool, channels: Sequence[int] | None) -> None:
    """Raises UserError if channels are chosen and nothing is drawn."""
    if channels is not None and not pictures:
        raise UserError(f"channels = {list(channels)} has no effect without pictures: add --pictures")


def report_bad_images(source: ImageSource, bad_images: dict[int, str]) -> None:
    """Logs the number of unreadable images with the first names and reasons.

    Raises:
        DataError: if no image could be read.
    """
    if not bad_images:
        return
    first = [f"{source.name(i)} ({bad_images[i]})" for i in sorted(bad_images)[:NUM_BAD_SHOWN]]
    shown = "; ".join(first) + ("; ..." if len(bad_images) > NUM_BAD_SHOWN else "")
    if len(bad_images) == len(source):
        raise DataError(f"none of the {len(source)} images can be read: {shown}")
    log.warning("left out %d of %d images that cannot be read: %s", len(bad_images), len(source), shown)


def write_json(record: Any, path: Path) -> None:
    """Writes a JSON file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_csv(rows: Sequence[dict[str, Any]], k: int, path: Path) -> None:
    header = ["image", *(f"{name}_{i}" for i in range(1, k + 1) for name in ("class", "probability"))]
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            cells = [cell for one in row["top"] for cell in (one["class"], f"{one['probability']:.6f}")]
            writer.writerow([row["image"], *cells])


def _draw(drawing: Drawing, source: NamedFiles, index: int, classes: Sequence[dict[str, Any]], folder: Path) -> None:
    try:
        image = drawing.image(source.load(index), MAX_SIDE)
    except BadImageError as error:  # changed since the loader has read it
        log.warning("no picture of %s: %s", source.name(index), error)
        return
    folder.mkdir(exist_ok=True)
    picture = with_bars(image, [one["class"] for one in classes], [one["probability"] for one in classes])
    picture.save(folder / picture_name(index, source.name(index)))
