"""A look at COCO annotations before training: what mmdet would otherwise report hours later, or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae_et.errors import DataError

MAX_BYTES = 100 * 2**20  # larger files are read once, by the library: COCO's own is known to be in order
NUM_CHECKED = 500  # images that are looked for, spread over the set


def check_coco(
    annotations: Path, images: Path, classes: Sequence[str] | None = None, needs_objects: bool = False
) -> None:
    """Makes sure that annotations, images and classes belong together.

    Args:
        annotations: a json in COCO's form.
        images: the folder of the files that it names.
        classes: names that the data set was given; None: its own.
        needs_objects: images without any are left out.
    Raises:
        DataError: with all that is wrong.
    """
    if not annotations.is_file():
        raise DataError(f"no such annotations: {annotations}")
    if annotations.stat().st_size > MAX_BYTES:
        return
    try:
        content: dict[str, Any] = json.loads(annotations.read_text(encoding="utf-8"))
        entries, objects = content["images"], content["annotations"]
        names = {category["id"]: category["name"] for category in content["categories"]}
        ids = {image["id"] for image in entries}
        used = {(item["category_id"], item["image_id"]) for item in objects}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{annotations} is not in COCO's form ({type(error).__name__}: {error})") from error
    faults = []
    if unknown := sorted({category for category, _ in used} - set(names)):
        faults.append(f"category ids {unknown[:6]} are used, but not in 'categories': add them there")
    if strays := sorted({image for _, image in used} - ids):
        faults.append(f"{len(strays)} image ids are annotated, but not in 'images', e.g. {strays[:3]}: remove them")
    if classes is not None:
        some = ", ".join(list(names.values())[:6])
        if lacking := [name for name in classes if name not in names.values()]:
            faults.append(
                f"classes {', '.join(lacking[:6])} are not in 'categories' ({some}, ...): set metainfo.classes"
            )
    step = max(1, len(entries) // NUM_CHECKED)
    if missing := [entry["file_name"] for entry in entries[::step] if not (images / entry["file_name"]).is_file()]:
        faults.append(
            f"{len(missing)} of {len(entries[::step])} images are not in {images}, e.g. {missing[0]}: set data_prefix.img"
        )
    if not entries:
        faults.append("it names no images")
    elif needs_objects and not any(names.get(category) in (classes or names.values()) for category, _ in used):
        faults.append(
            "no object is of these classes, so that filter_cfg.filter_empty_gt leaves no image: annotate some"
        )
    if faults:
        raise DataError(f"{annotations}: " + "; ".join(faults))
