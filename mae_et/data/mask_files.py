"""Folders of images and masks: which file belongs to which, and what the values of a mask mean. Without mmseg."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_et.data.decoding import IMAGE_EXTENSIONS
from mae_et.errors import DataError

IGNORED = 255  # the label that no loss and no metric counts
MASK_EXTENSIONS = ("png", "bmp", "tif", "tiff", "gif", "pgm")
LAYOUT = (
    '{"classes": ["road", "car"]}: value 1 is the first class, 2 the second, 0 and 255 are unlabelled; or '
    '{"classes": {"road": [0, 7], "car": 255}, "ignore": [1]}: each class with its values'
)


@dataclass(frozen=True)
class ClassList:
    """The classes of masks.

    Args:
        names: in the order of the labels.
        labels: value in a mask -> label, or IGNORED.
        palette: a color for each class; None: any.
    """

    names: tuple[str, ...]
    labels: Mapping[int, int]
    palette: list[list[int]] | None = None


def read_classes(path: Path) -> ClassList:
    """Reads a `classes.json`, in one of the forms of `LAYOUT`.

    Raises:
        DataError: if it is missing or is in neither form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        classes, ignored = content["classes"], content.get("ignore", [])
        if isinstance(classes, dict):
            values = {name: [value] if isinstance(value, int) else list(value) for name, value in classes.items()}
        else:
            values = {name: [number] for number, name in enumerate(classes, 1)}
            ignored = [0, IGNORED, *(value for value in ignored if value not in (0, IGNORED))]
            if len(values) < len(classes):
                raise ValueError("a class is listed twice")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} does not list the classes ({reason}). It must hold {LAYOUT}") from error
    labels: dict[int, int] = {}
    for label, used in [*enumerate(values.values()), (IGNORED, ignored)]:
        for value in used:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 255:
                raise DataError(f"{path}: the value {value!r} must be a whole number from 0 to 255. Correct the list")
            if value in labels:
                raise DataError(f"{path}: the value {value} is listed twice. Leave it in one place")
            labels[value] = label
    if not values or not all(isinstance(name, str) and used for name, used in values.items()):
        raise DataError(f"{path} does not list the classes: each needs a name and a value. It must hold {LAYOUT}")
    return ClassList(tuple(values), labels, content.get("palette"))


@dataclass(frozen=True)
class Pairs:
    """Images with their masks.

    Args:
        files: (image, mask), sorted by image.
        lonely_images: without a mask.
        lonely_masks: without an image.
        others: files in the folder of images that are no images.
    """

    files: Sequence[tuple[Path, Path]]
    lonely_images: Sequence[Path]
    lonely_masks: Sequence[Path]
    others: Sequence[Path]


def pair_files(
    images: Path,
    masks: Path,
    stems: Sequence[str] | None = None,
    image_suffix: str = "",
    mask_suffix: str = "",
) -> Pairs:
    """Pairs images and masks by their path below the folders without the suffix.

    Args:
        images: a folder; its subfolders are searched too.
        masks: a folder of the same structure, or the same folder, where a suffix tells masks from images.
        stems: names to take, e.g. "city/0001"; None: all.
        image_suffix: ending of images, e.g. ".jpg"; "": any of `IMAGE_EXTENSIONS`, in any case.
        mask_suffix: likewise; "": any of `MASK_EXTENSIONS`.
    Raises:
        DataError: if a folder is missing, two files have one stem, a name of `stems` has no image, or images and masks in one
            folder have no suffixes.
    """
    is_same = images.resolve() == masks.resolve()
    if is_same and not (image_suffix or mask_suffix):
        raise DataError(
            f"images and masks are in one folder, {images}. Set seg_map_suffix (e.g. '_mask.png') or img_suffix ('.jpg'), which "
            "tell them apart, or data_prefix"
        )
    found_images, others = _by_stem(images, image_suffix, IMAGE_EXTENSIONS, mask_suffix if is_same else "")
    found_masks, _ = _by_stem(masks, mask_suffix, MASK_EXTENSIONS, image_suffix if is_same else "")
    if is_same:
        others = sorted(set(others) - set(found_masks.values()))
    if stems is not None:
        if absent := [stem for stem in stems if stem not in found_images]:
            raise DataError(
                f"{len(absent)} names of the list have no image in {images}, e.g. {absent[0]}. Correct the list"
            )
        found_images = {stem: found_images[stem] for stem in dict.fromkeys(stems)}
        others, found_masks = [], {stem: path for stem, path in found_masks.items() if stem in found_images}
    return Pairs(
        sorted((path, found_masks[stem]) for stem, path in found_images.items() if stem in found_masks),
        sorted(path for stem, path in found_images.items() if stem not in found_masks),
        sorted(path for stem, path in found_masks.items() if stem not in found_images),
        others,
    )


def _by_stem(
    folder: Path, suffix: str, extensions: Sequence[str], other_suffix: str
) -> tuple[dict[str, Path], list[Path]]:
    """Returns stem -> file, and the files with other endings.

    Args:
        folder: searched with its subfolders.
        suffix: ending of the files; "": any of `extensions`.
        extensions: in lower case, without the dot.
        other_suffix: ending of the other half of the pairs, if it is in the same folder; "": none.
    """
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}. Set data_root and data_prefix")
    found: dict[str, Path] = {}
    others = []
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in sorted(names):
            path = Path(parent, name)
            ending = suffix or path.suffix
            is_wanted = name.endswith(suffix) if suffix else path.suffix.lower().lstrip(".") in extensions
            # Of two suffixes that fit, the longer one decides: `x_mask.png` is no image of the suffix `.png`.
            is_other = bool(other_suffix) and name.endswith(other_suffix) and len(other_suffix) > len(suffix)
            if name.startswith(".") or not is_wanted or is_other:
                others.append(path)
                continue
            stem = str(path.relative_to(folder))[: -len(ending)]
            if stem in found:
                raise DataError(f"{found[stem]} and {path} have the same stem, so pairs are not unique. Rename one")
            found[stem] = path
    return found, [path for path in others if not path.name.startswith(".")]


def mask_options(options: Mapping[str, Any]) -> tuple[Path, Path, list[str] | None, str, str]:
    """Returns the arguments of `pair_files` for a config's dataset."""
    root, prefix = Path(options.get("data_root") or ""), options.get("data_prefix") or {}
    listed = options.get("ann_file")
    stems = None
    if listed and (root / listed).is_file():
        stems = [line.strip() for line in (root / listed).read_text(encoding="utf-8").splitlines() if line.strip()]
    elif listed:
        raise DataError(f"no such list of images: {root / listed}. Set ann_file")
    suffixes = (options.get("img_suffix", ""), options.get("seg_map_suffix", ""))
    return root / prefix.get("img_path", ""), root / prefix.get("seg_map_path", ""), stems, *suffixes
