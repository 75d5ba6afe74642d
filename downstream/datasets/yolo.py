"""Boxes and polygons in YOLO's text format, and their conversion to COCO's annotations. Without mmdet.

A data set is described by a `data.yaml`: `path` (the root; default: its own folder), `train`, `val` and `test` (folders of
images, list files, or lists of these), and `names` (of the classes). The labels of `images/x.jpg` are in `labels/x.txt`: the
last folder `images` of the path is replaced. Where there is none, they are beside the image. Each line is `CLASS CX CY W H` or
`CLASS X1 Y1 X2 Y2 X3 Y3 ...`, in fractions of the width and height of the image as displayed.

Source: the format of Ultralytics' detection and segmentation data sets, https://docs.ultralytics.com/datasets/detect/.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from downstream.checks.findings import Findings, named
from downstream.checks.headers import read_headers
from mae_et.config.source_list import join_sources
from mae_et.data.sources.files import FileSource
from mae_et.data.sources.listing import nearest_folder
from mae_et.data.sources.source import parts_of
from mae_et.data.sources.spec import open_source
from mae_et.errors import DataError, printable
from mae_et.storage.atomic import atomic_path

SPLITS = ("train", "val", "test")
_TOLERANCE = 0.01  # of the side, for rounding
_OUTSIDE = 1.0  # px that a box may reach beyond its image without being counted


@dataclass(frozen=True)
class YoloData:
    """The content of a data.yaml.

    Args:
        root: that the paths of the splits begin at, absolute.
        names: of the classes, in the order of their numbers.
        splits: name -> folders and list files of its images.
    """

    root: Path
    names: Sequence[str]
    splits: Mapping[str, Sequence[Path]]


def read_yolo(path: Path) -> YoloData:
    """Reads a data.yaml.

    Raises:
        DataError: if it cannot be read, names no classes or no split, or a folder is missing.
    """
    shown = printable(str(path))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"{shown} cannot be read ({str(error).splitlines()[0]}); name the data.yaml of the set"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{shown} is not a data.yaml; it must have the keys names, train and val")
    if "kpt_shape" in content:
        raise DataError(f"{shown} has kpt_shape, so its lines hold key points; only boxes and polygons are read")
    names = content.get("names")
    if isinstance(names, dict):
        names = [names.get(number) for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str | int) for name in names):
        raise DataError(f"{shown}: names = {str(names)[:80]} is not the list of all classes; write names: [cat, dog]")
    names = [str(name) for name in names]
    if len(set(names)) < len(names):
        raise DataError(f"{shown}: a name occurs twice in names: {named(names)}; rename one")
    root = Path(os.path.abspath(path.parent / str(content.get("path") or "")))
    splits: dict[str, list[Path]] = {}
    for split in SPLITS:
        if entries := content.get(split):
            entries = entries if isinstance(entries, list) else [entries]
            splits[split] = [_found(root, str(entry), f"{shown}: {split}") for entry in entries]
    if not splits:
        raise DataError(f"{shown} names no images; write train: and val: with their folders")
    return YoloData(root, names, splits)


def _found(root: Path, entry: str, where: str) -> Path:
    # Roboflow writes `../train/images` for a folder that is beside data.yaml.
    for name in (entry, entry.removeprefix("../")):
        if (root / name).exists():
            return Path(os.path.abspath(root / name))
    raise DataError(f"{where} = {printable(entry)} does not exist; {nearest_folder(root / entry)}")


def to_coco(data: YoloData, split: str) -> tuple[dict[str, Any], Findings]:
    """Converts one split.

    Boxes are clipped to the image. A line that occurs again in its file is left out. Category ids count from 1.

    Args:
        data: of `read_yolo`.
        split: one of its splits.
    Returns:
        The content of a json in COCO's form, with `file_name` relative to the root, or absolute for images outside; and what was
        counted. Its errors are lines and images that cannot be read.
    """
    source = open_source(str(join_sources([str(path) for path in data.splits[split]])))
    images: list[Path] = []
    for part in parts_of(source):
        if not isinstance(part, FileSource):
            raise DataError(f"{split} names no image files: {named(data.splits[split])}; name folders or list files")
        images += [Path(os.path.abspath(part.path(index))) for index in range(len(part))]
    findings = Findings(split)
    entries: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    unlabelled, empty, broken, faults, clipped, repeated = [], [], [], [], [], []
    labels = [label_path(image) for image in images]
    for number, (image, label, header) in enumerate(zip(images, labels, read_headers(images), strict=True), 1):
        size = header.loaded_size(is_turned=True)
        if size is None:
            broken.append(f"{image} ({header.fault})")
            continue
        name = image.relative_to(data.root) if image.is_relative_to(data.root) else image
        entries.append({"id": number, "file_name": str(name), "width": size[0], "height": size[1]})
        try:
            lines = [
                line for line in enumerate(label.read_text(encoding="utf-8-sig").splitlines(), 1) if line[1].strip()
            ]
        except FileNotFoundError:
            unlabelled.append(image)
            continue
        except (OSError, ValueError) as error:
            faults.append(f"{label} ({error})")
            continue
        if not lines:
            empty.append(label)
        seen: set[str] = set()
        for at, line in lines:
            where = f"{label}:{at}"
            if line.strip() in seen:
                repeated.append(where)
                continue
            seen.add(line.strip())
            found = _read_line(line, size, len(data.names))
            if isinstance(found, str):
                faults.append(f"{where} {found}")
                continue
            item, is_clipped = found
            if is_clipped:
                clipped.append(where)
            objects.append({"id": len(objects) + 1, "image_id": number, "iscrowd": 0, **item})
    if broken:
        findings.errors.append(f"{len(broken)} images cannot be read: {named(broken)}. Replace or remove them")
    if faults:
        findings.errors.append(f"{len(faults)} lines of labels cannot be read: {named(faults)}. Correct them")
    findings.counts.update({"images": len(entries), "objects": len(objects)})
    findings.count("images have no file of labels, and are taken for images without objects", unlabelled)
    findings.count("files of labels are empty", empty)
    findings.count("lines are repeated (left out)", repeated)
    findings.count(f"boxes reach more than {_OUTSIDE:g} px beyond their image (clipped)", clipped)
    findings.count("files of labels have no image (left out)", _lonely(labels))
    if not objects and not findings.errors:
        findings.errors.append(
            f"no image has an object. The labels are looked for in {labels[0].parent}: move them there"
        )
    categories = [{"id": number, "name": name} for number, name in enumerate(data.names, 1)]
    return {"images": entries, "annotations": objects, "categories": categories}, findings


def label_path(image: Path) -> Path:
    """Returns the path of an image's labels."""
    folders = list(image.parent.parts)
    if "images" in folders:
        last = len(folders) - 1 - folders[::-1].index("images")
        folders[last] = "labels"
    return Path(*folders, f"{image.stem}.txt")


def _lonely(labels: Sequence[Path]) -> list[Path]:
    """Returns the files of labels that belong to no image, in the folders that hold labels."""
    known, found = set(labels), []
    for folder in sorted({label.parent for label in labels}):
        if folder.is_dir():
            found += [path for path in sorted(folder.glob("*.txt")) if path not in known and path.name != "classes.txt"]
    return found


def _read_line(line: str, size: tuple[int, int], num_classes: int) -> tuple[dict[str, Any], bool] | str:
    """Reads one object.

    Args:
        line: of a file of labels.
        size: (width, height) of the image, px.
        num_classes: of the set.
    Returns:
        The fields of an annotation and whether its box was clipped; or what is wrong with the line.
    """
    try:
        number, *values = map(float, line.split())
    except ValueError:
        return f"holds {printable(line.strip()[:40])!r}, not numbers"
    if number not in range(num_classes):
        return f"has class {number:g}, but names lists {num_classes}, numbered from 0"
    is_box = len(values) == 4
    if not is_box and (len(values) < 6 or len(values) % 2):
        return f"has {len(values)} numbers after the class; a box has 4, a polygon an even number from 6 on"
    if not all(-_TOLERANCE <= value <= 1 + _TOLERANCE for value in values):  # also NaN
        return "has coordinates outside 0..1; they are fractions of the image's sides, not px"
    width, height = size
    if is_box:
        x, y, w, h = values
        xs, ys = [(x - w / 2) * width, (x + w / 2) * width], [(y - h / 2) * height, (y + h / 2) * height]
    else:
        xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
    inside_x, inside_y = [min(max(x, 0.0), width) for x in xs], [min(max(y, 0.0), height) for y in ys]
    moved = max(abs(a - b) for a, b in zip(xs + ys, inside_x + inside_y, strict=True))
    left, top, right, bottom = min(inside_x), min(inside_y), max(inside_x), max(inside_y)
    box_area = (right - left) * (bottom - top)
    if box_area <= 0:
        return "has no area"
    item: dict[str, Any] = {
        "category_id": int(number) + 1,
        "bbox": [round(value, 3) for value in (left, top, right - left, bottom - top)],
        "area": round(box_area, 3),
    }
    if not is_box:
        corners = list(zip(inside_x, inside_y, strict=True))
        following = [*corners[1:], corners[0]]
        twice = sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in zip(corners, following, strict=True))
        item["segmentation"] = [[round(value, 3) for corner in corners for value in corner]]
        item["area"] = round(abs(twice) / 2, 3)
    return item, moved > _OUTSIDE


def write_coco(content: Mapping[str, Any], path: Path) -> None:
    """Writes annotations in COCO's form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
