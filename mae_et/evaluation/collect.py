"""Runs a network over fixed images, for features and for accuracies, and writes down how good the answers are.

Shapes: M images, D values of the output.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mae_et.config.schema import DataConfig
from mae_et.data.sources.source import ImageSource
from mae_et.data.stream import eval_loader, reading
from mae_et.errors import DataError
from mae_et.evaluation.metrics import confusion_matrix, per_class_accuracy, topk_correct, wilson_interval
from mae_et.evaluation.pictures import draw_confusion

BATCH_SIZE = 256


@dataclass
class Collected:
    """What a network said of the readable images."""

    outputs: Tensor  # [M, D] float32, on the device
    labels: Tensor  # [M] int64, on the device; -1 where there are none
    bad_images: dict[int, str]  # index -> reason; these are in neither of the above


@torch.inference_mode()
def collect(
    function: Callable[[Tensor], Tensor],
    source: ImageSource,
    indices: Sequence[int] | np.ndarray,
    data: DataConfig,
    device: torch.device,
    num_workers: int = 0,
    batch_size: int = BATCH_SIZE,
    title: str | None = None,
) -> Collected:
    """Applies a function to centre-cropped images.

    Args:
        function: [n, C, S, S] uint8 on the device -> [n, D].
        source: the images.
        indices: which ones.
        data: image_size S and eval_crop_ratio.
        device: where to compute.
        num_workers: loader processes.
        batch_size: n at most.
        title: of the progress bar; None: no bar.
    Returns:
        Outputs in the order of the indices.
    Raises:
        DataError: if none of the images can be read.
    """
    outputs, labels, bad = [], [], {}
    loader = eval_loader(source, indices, data.image_size, batch_size, num_workers, data.eval_crop_ratio)
    with reading(loader) as batches, tqdm(total=len(indices), desc=title, disable=None if title else True) as bar:
        for batch in batches:
            bad.update({image.index: image.reason for image in batch.bad_images})
            if len(batch.images):
                outputs.append(function(batch.images.to(device, non_blocking=True)).float())
                labels.append(batch.labels)
            bar.update(len(batch.labels) + len(batch.bad_images))
    if not outputs:
        index, reason = next(iter(bad.items()))
        raise DataError(f"none of the {len(indices)} images can be read, e.g. {source.name(index)}: {reason}")
    return Collected(torch.cat(outputs), torch.cat(labels).to(device), bad)


def write_verdict(
    logits: Tensor, labels: Tensor, class_names: list[str], work_dir: Path, top5: bool = True
) -> dict[str, Any]:
    """Writes per_class.csv, confusion.csv and confusion.png; returns the accuracies.

    Args:
        logits: [M, classes].
        labels: [M].
        class_names: in the order of the labels.
        work_dir: where to write.
        top5: whether the logits rank more than the first class.
    """
    logits, labels = logits.cpu(), labels.cpu()
    num_classes = len(class_names)
    correct = int(topk_correct(logits, labels).sum())
    confusion = confusion_matrix(logits.argmax(dim=1), labels, num_classes)
    with open(work_dir / "per_class.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "name", "num_images", "accuracy"])
        accuracies = per_class_accuracy(confusion).tolist()
        for i, (name, accuracy) in enumerate(zip(class_names, accuracies, strict=True)):
            rows.writerow([i, name, int(confusion[i].sum()), "" if accuracy != accuracy else f"{accuracy:.4f}"])
    with open(work_dir / "confusion.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["true \\ predicted", *class_names])
        rows.writerows([name, *counts] for name, counts in zip(class_names, confusion.tolist(), strict=True))
    draw_confusion(confusion, class_names, work_dir / "confusion.png")
    return {
        "top1": correct / len(labels),
        "top1_interval_95": wilson_interval(correct, len(labels)),
        "top5": float(topk_correct(logits, labels, 5).double().mean()) if top5 and num_classes > 5 else None,
        "num_val": len(labels),
        "num_classes": num_classes,
    }
