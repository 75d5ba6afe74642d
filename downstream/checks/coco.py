"""Inspects COCO annotations and the headers of their images before a run.

Source: the format of COCO (arXiv 1405.0312); which objects mmdetection drops: `mmdet.datasets.CocoDataset.parse_data_info`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from downstream.checks.findings import Findings, named
from downstream.checks.headers import read_headers
from mae_et.errors import DataError

FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
OUTSIDE = 1.0  # px that a box may reach beyond its image, for rounding


def inspect_coco(
    annotations: Path,
    images: Path,
    classes: Sequence[str] | None = None,
    *,
    is_scored: bool = False,
    drops_empty: bool = False,
    min_size: int = 0,
    needs_masks: bool = False,
    reads_runs: bool = True,
    is_turned: bool = True,
) -> Findings:
    """Compares annotations with themselves, with the classes of a config and with the image files.

    Every object and the header of every image is read.

    Args:
        annotations: a json in COCO's form.
        images: the folder of the files that it names.
        classes: `metainfo.classes`; None: its own.
        is_scored: AP is computed on this set, which is not defined without objects.
        drops_empty: images without objects are left out, by `filter_cfg.filter_empty_gt`.
        min_size: px; images with a shorter side are left out, by `filter_cfg.min_size`.
        needs_masks: the model or the metric uses masks.
        reads_runs: masks as run lengths can be loaded, i.e. `LoadAnnotations.poly2mask`.
        is_turned: the loader turns images upright by EXIF.
    Raises:
        DataError: if the file is missing or not in COCO's form.
    """
    content = _read(annotations)
    findings = Findings(str(annotations))
    findings.counts.update(images=len(content["images"]), objects=len(content["annotations"]))
    names = _check_categories(findings, content["categories"], classes)
    entries = {entry["id"]: entry for entry in content["images"]}
    if len(entries) < len(content["images"]):
        repeated = [key for key, times in Counter(e["id"] for e in content["images"]).items() if times > 1]
        findings.errors.append(f"image ids occur more than once: {named(repeated)}. Give each image its own id")
    if not entries:
        findings.errors.append("it lists no images")
    num_used = _check_objects(findings, content["annotations"], entries, names, needs_masks, reads_runs)
    if not num_used and not findings.errors:
        if is_scored:
            findings.errors.append("no object is of these classes, so AP is not defined. Use a set with annotations")
        elif drops_empty:
            findings.errors.append(
                "no object is of these classes, so filter_cfg.filter_empty_gt leaves no image. Annotate some"
            )
    _check_filter(findings, content["annotations"], entries, names, drops_empty, min_size)
    _check_files(findings, list(entries.values()), images, is_turned)
    return findings


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Reads the json; makes sure that all entries have the fields that everything else relies on."""
    if not path.is_file():
        raise DataError(f"no such annotations: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not in COCO's form ({type(error).__name__}: {error})") from error
    for part, fields in FIELDS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path} is not in COCO's form: {part!r} must be a list of objects")
        for field in fields:
            lacking = [index for index, entry in enumerate(entries) if entry.get(field) is None]
            if lacking:
                raise DataError(
                    f"{path} is not in COCO's form: {len(lacking)} of {len(entries)} entries of {part!r} have no {field!r}, "
                    f"e.g. number {named(lacking)}. Add the field"
                )
    for part, field, kind in (
        ("images", "id", (int, str)), ("images", "file_name", str),
        ("images", "height", (int, float)), ("images", "width", (int, float)),
        ("annotations", "image_id", (int, str)), ("annotations", "category_id", (int, str)),
        ("categories", "id", (int, str)), ("categories", "name", str),
    ):  # fmt: skip
        wrong = [entry[field] for entry in content[part] if not isinstance(entry[field], kind)]
        if wrong:
            raise DataError(
                f"{path} is not in COCO's form: {field!r} of {len(wrong)} entries of {part!r} has a wrong type, "
                f"e.g. {named(wrong)}"
            )
    return content


def _check_categories(
    findings: Findings, categories: Sequence[Mapping[str, Any]], classes: Sequence[str] | None
) -> dict[Any, str]:
    """Returns id -> name, "" for categories outside of the classes; notes classes that are missing or not unique."""
    names = {category["id"]: category["name"] for category in categories}
    if len(names) < len(categories):
        findings.errors.append("category ids occur more than once in 'categories'. Give each category its own id")
    wanted = list(names.values()) if classes is None else list(classes)
    if lacking := [name for name in wanted if name not in names.values()]:
        findings.errors.append(
            f"classes {named(lacking)} are not in 'categories' ({named(list(names.values()))}). Set metainfo.classes"
        )
    if twice := [name for name, times in Counter(wanted).items() if times > 1 and classes is not None]:
        findings.errors.append(f"metainfo.classes lists {named(twice)} more than once")
    for name in dict.fromkeys(wanted):
        ids = [key for key, value in names.items() if value == name]
        if len(ids) > 1:
            findings.errors.append(
                f"the class name {name!r} is used by categories {' and '.join(map(str, ids))}, so a label would have two "
                "meanings. Rename or remove one of them; an unused root category of an export can be deleted"
            )
    return {key: value if value in wanted else "" for key, value in names.items()}


def _check_objects(
    findings: Findings,
    objects: Sequence[Mapping[str, Any]],
    entries: Mapping[Any, Mapping[str, Any]],
    names: Mapping[Any, str],
    needs_masks: bool,
    reads_runs: bool,
) -> int:
    """Returns how many objects can be learned; notes what is wrong with any."""
    strays, unknown, others, boxless, tiny, outside, beyond, maskless, runs, misfit = ([] for _ in range(10))
    used = no_area = no_crowd = ignored = crowds = 0
    for index, item in enumerate(objects):
        entry, category = entries.get(item["image_id"]), item["category_id"]
        label = f"object {item.get('id', index)}"
        if entry is None:
            strays.append(item["image_id"])
            continue
        if category not in names:
            unknown.append(category)
            continue
        if not names[category]:
            others.append(category)
            continue
        box = item["bbox"]
        if not _is_box(box):
            boxless.append(f"{label} ({box})")
            continue
        label += f" of {entry['file_name']}"
        no_crowd += item.get("iscrowd") is None
        no_area += not has_area(item)
        if item.get("ignore"):
            ignored += 1
            continue
        x, y, width, height = box
        over = max(-x, -y, x + width - entry["width"], y + height - entry["height"])
        if width < 1 or height < 1:
            tiny.append(label)
            continue
        if x >= entry["width"] or y >= entry["height"] or x + width <= 0 or y + height <= 0:
            outside.append(label)
            continue
        if over > OUTSIDE:
            beyond.append(label)
        if item.get("iscrowd"):
            crowds += 1
            continue
        used += 1
        outline = item.get("segmentation")
        if not _has_mask(outline):
            maskless.append(label)
        elif isinstance(outline, dict):
            runs.append(label)
            if not _fits(outline, entry):
                misfit.append(label)

    counted = {"objects without area (computed)": no_area, "objects without iscrowd (taken as 0)": no_crowd,
               "crowd objects (not learned, not counted as errors)": crowds,
               "objects marked 'ignore' (left out)": ignored}  # fmt: skip
    findings.counts.update({name: number for name, number in counted.items() if number})
    error = findings.errors.append
    if strays:
        error(
            f"{len(strays)} objects are on images that are not in 'images': image ids {named(_unique(strays))}. Remove them"
        )
    if unknown:
        error(f"category ids {named(_unique(unknown))} are used, but not in 'categories'. Add them there")
    if boxless:
        error(f"{len(boxless)} objects have no box [x, y, width, height] of four numbers: {named(boxless)}")
    total = used + crowds + len(tiny) + len(outside)
    if tiny and len(tiny) == total:
        error(
            f"no object is at least 1 px wide and high, so mmdetection drops all {len(tiny)} of them. Boxes are "
            "[x, y, width, height] in px: multiply fractions of the image by its width and height"
        )
    else:
        findings.count("objects are smaller than 1 px (left out)", tiny)
    if total and len(outside) + len(beyond) > total / 2:
        error(
            f"{len(outside) + len(beyond)} of {total} boxes reach outside of their image, e.g. {named([*outside, *beyond])}. "
            "Boxes are [x, y, width, height] in px of the displayed image, not [x1, y1, x2, y2]"
        )
    else:
        findings.count("boxes lie outside of their image (left out)", outside)
        findings.count("boxes reach beyond their image by more than 1 px", beyond)
    if others:
        findings.count("objects are of categories that are not in metainfo.classes (left out)", others)
    if needs_masks:
        if maskless:
            error(
                f"{len(maskless)} of {used} objects have no usable 'segmentation', e.g. {named(maskless)}. Add masks, remove "
                "these objects, or choose a model and a metric without masks"
            )
        if misfit:
            error(
                f"the run lengths of {len(misfit)} masks do not have the size of their image, e.g. {named(misfit)}. "
                "'size' must be [height, width]"
            )
        if runs and not reads_runs:
            error(
                f"{len(runs)} masks are run lengths, which LoadAnnotations(poly2mask=False) drops. Set poly2mask=True"
            )

    return used


def _check_filter(
    findings: Findings,
    objects: Sequence[Mapping[str, Any]],
    entries: Mapping[Any, Mapping[str, Any]],
    names: Mapping[Any, str],
    drops_empty: bool,
    min_size: int,
) -> None:
    """Counts the images that mmdetection's `filter_cfg` leaves out."""
    annotated = {item["image_id"] for item in objects if names.get(item["category_id"])}
    empty = [entry["file_name"] for key, entry in entries.items() if key not in annotated]
    small = [entry["file_name"] for entry in entries.values() if min(entry["width"], entry["height"]) < min_size]
    if empty:
        findings.counts[f"images without objects{' (left out)' if drops_empty else ''}"] = len(empty)
    findings.count(f"images are smaller than filter_cfg.min_size = {min_size} px (left out)", small)
    if entries and len(small) == len(entries):
        findings.errors.append(f"all images are smaller than filter_cfg.min_size = {min_size} px. Lower it")


def _check_files(findings: Findings, entries: Sequence[Mapping[str, Any]], images: Path, is_turned: bool) -> None:
    """Compares the sizes in the json with the files, as stored and as loaded."""
    paths = [images / entry["file_name"] for entry in entries]
    missing: list[str] = []
    broken: list[str] = []
    wrong: list[str] = []
    sideways: list[str] = []
    unproven: list[str] = []
    num_turned = 0
    for entry, path, header in zip(entries, paths, read_headers(paths), strict=True):
        if header.fault:
            (missing if header.fault == "no such file" else broken).append(
                entry["file_name"] if header.fault == "no such file" else f"{path} ({header.fault})"
            )
            continue
        given, loaded = (entry["width"], entry["height"]), header.loaded_size(is_turned)
        num_turned += header.orientation != 1
        if given != loaded:
            description = f"{path}: {_times(given)} px in the json, {_times(loaded)} px as loaded"
            (sideways if given == header.loaded_size(not is_turned) else wrong).append(description)
        elif header.orientation != 1 and (header.size[0] == header.size[1] or header.orientation < 5):  # type: ignore[index]
            unproven.append(str(path))
    if missing:
        findings.errors.append(
            f"{len(missing)} of {len(paths)} images are not in {images}, e.g. {missing[0]}. Set data_prefix.img"
        )
    if broken:
        findings.errors.append(f"{len(broken)} images cannot be read: {named(broken)}. Replace or remove them")
    if wrong:
        findings.errors.append(
            f"{len(wrong)} images have another size than the json says: {named(wrong)}. Correct width and height, and check that "
            "the boxes belong to these files"
        )
    if sideways:
        state, other = ("displayed", "stored") if is_turned else ("stored", "displayed")
        findings.errors.append(
            f"{len(sideways)} images are turned by EXIF, and the json has their {other} size: {named(sideways)}. "
            f"Annotations must be in {state} pixels here. "
            + (
                "Convert them, or set color_type='color_ignore_orientation' in each LoadImageFromFile if all annotations are "
                "in stored pixels"
                if is_turned
                else "Convert them, or use color_type='color' in each LoadImageFromFile"
            )
        )
    if num_turned:
        findings.counts["images with an EXIF orientation"] = num_turned
    if unproven:
        state = "displayed" if is_turned else "stored"
        findings.warnings.append(
            f"{len(unproven)} images have an EXIF orientation that their size does not prove, e.g. {named(unproven)}: make sure "
            f"that their boxes are in {state} pixels"
        )


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in box)
    )


def has_area(item: Mapping[str, Any]) -> bool:
    """Whether an object gives a usable area. mmdetection drops objects of area 0."""
    area = item.get("area")
    return isinstance(area, (int, float)) and not isinstance(area, bool) and 0 < area < math.inf


def _has_mask(outline: Any) -> bool:
    """Whether mmdetection can use a 'segmentation': a polygon of three points or more, or run lengths."""
    if isinstance(outline, list):
        return any(isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in outline)
    return isinstance(outline, dict) and bool(outline.get("counts")) and bool(outline.get("size"))


def _fits(runs: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    size, counts = runs["size"], runs["counts"]
    if not isinstance(counts, (list, str)) or list(size) != [entry["height"], entry["width"]]:
        return False
    return isinstance(counts, str) or sum(counts) == size[0] * size[1]


def _times(size: tuple[int, int] | None) -> str:
    return "unknown" if size is None else f"{size[0]} x {size[1]}"


def _unique(items: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(items))
