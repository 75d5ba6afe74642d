"""Inspects pairs of images and masks before a run: sizes of all, values of all or of a stated sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from downstream.checks.findings import Findings, named
from downstream.checks.headers import NUM_THREADS, read_headers
from mae_et.data.mask_files import IGNORED, LAYOUT, Pairs

NUM_SAMPLED = 500  # masks whose pixels are read, spread over the set; headers are read of all


def inspect_masks(
    pairs: Pairs,
    where: str,
    labels: Mapping[int, int] | None,
    classes: Sequence[str],
    is_turned: bool = True,
    needs_all_classes: bool = True,
) -> Findings:
    """Compares images, masks and classes.

    Args:
        pairs: from `pair_files`.
        where: the data set, for messages.
        labels: value in a mask -> label, 255 for unlabelled; None: not known, values are only listed.
        classes: names of the labels.
        is_turned: the loader turns images upright by EXIF. It never turns masks.
        needs_all_classes: warn of classes that no mask shows; for training.
    """
    findings = Findings(where)
    findings.counts["pairs of image and mask"] = len(pairs.files)
    if pairs.lonely_images:
        findings.errors.append(
            f"{len(pairs.lonely_images)} images have no mask, e.g. {pairs.lonely_images[0]}. Add masks or remove these images"
        )
    if not pairs.files:
        findings.errors.append("no pair of image and mask. Both must have the same name up to the suffix")
    findings.count("masks have no image (left out)", pairs.lonely_masks)
    findings.count("other files among the images (left out)", pairs.others)
    _check_sizes(findings, pairs.files, is_turned)
    if not findings.errors:
        _check_values(findings, [mask for _, mask in pairs.files], labels, classes, needs_all_classes)
    return findings


def _check_sizes(findings: Findings, files: Sequence[tuple[Path, Path]], is_turned: bool) -> None:
    images, masks = read_headers([image for image, _ in files]), read_headers([mask for _, mask in files])
    broken, wrong = [], []
    for (image, mask), ours, theirs in zip(files, images, masks, strict=True):
        for path, header in ((image, ours), (mask, theirs)):
            if header.fault:
                broken.append(f"{path} ({header.fault})")
        loaded = ours.loaded_size(is_turned)
        if loaded and theirs.size and loaded != theirs.size:
            turned = " (turned by EXIF)" if loaded != ours.size else ""
            wrong.append(
                f"{mask} is {theirs.size[0]} x {theirs.size[1]} px, its image {loaded[0]} x {loaded[1]}{turned}"
            )
    if broken:
        findings.errors.append(f"{len(broken)} files cannot be read: {named(broken)}. Replace or remove them")
    if wrong:
        findings.errors.append(
            f"{len(wrong)} masks do not have the size of their image as it is loaded: {named(wrong)}. Images are turned upright "
            "by EXIF, masks are not: save masks as displayed"
        )


def _check_values(
    findings: Findings,
    masks: Sequence[Path],
    labels: Mapping[int, int] | None,
    classes: Sequence[str],
    needs_all_classes: bool,
) -> None:
    num_sampled = min(NUM_SAMPLED, len(masks))
    chosen = [index * len(masks) // num_sampled for index in range(num_sampled)]
    pixels: dict[int, int] = {}
    unlabelled: list[Path] = []
    foreign: dict[int, Path] = {}

    def add(path: Path, values: dict[int, int] | str) -> None:
        if isinstance(values, str):
            findings.errors.append(f"{path} {values}")
            return
        for value, number in values.items():
            pixels[value] = pixels.get(value, 0) + number
            if labels is not None and value not in labels:
                foreign.setdefault(value, path)
        if labels is not None and all(labels.get(value, IGNORED) == IGNORED for value in values):
            unlabelled.append(path)

    num_read = len(chosen)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for path, values in zip(
            [masks[i] for i in chosen], pool.map(count_values, [masks[i] for i in chosen]), strict=True
        ):
            add(path, values)
        if len(unlabelled) == num_read and not foreign:  # the others decide whether the set is empty
            for path in [masks[i] for i in sorted(set(range(len(masks))) - set(chosen))]:
                add(path, count_values(path))
                num_read += 1
                if len(unlabelled) < num_read:
                    break
    if findings.errors:
        return
    sample = f"all {len(masks)}" if num_read == len(masks) else f"a sample of {num_read} of {len(masks)}"
    total = sum(pixels.values())
    shares = {value: number / total for value, number in sorted(pixels.items())}
    listed = ", ".join(f"{value}: {share:.1%}" for value, share in list(shares.items())[:12])
    listed += f", and {len(shares) - 12} more" if len(shares) > 12 else ""
    findings.counts["masks read for their values"] = num_read
    findings.counts["share of pixels by value"] = {str(value): round(share, 6) for value, share in shares.items()}
    if labels is None:
        return
    if foreign:
        value, path = next(iter(foreign.items()))
        findings.errors.append(
            f"{path} has label {value}, but the classes end at {len(classes)}"
            f" (values {named(list(labels))}; {len(foreign)} such values in {sample} masks: {named(sorted(foreign))}). "
            f"Correct the mask, or list the value in classes.json, as in {LAYOUT}"
        )
    elif len(unlabelled) == num_read:
        findings.errors.append(
            f"no pixel is labelled in {sample} masks. Values and their share: {listed}. Give the values to classes in "
            f"classes.json: {LAYOUT}"
        )
    findings.count(f"masks without a labelled pixel, in {sample}", unlabelled if len(unlabelled) < num_read else [])
    ignored = sum(share for value, share in shares.items() if labels.get(value) == IGNORED)
    findings.counts["share of pixels unlabelled"] = round(ignored, 6)
    shown = {labels[value] for value in shares if value in labels}
    absent = [name for label, name in enumerate(classes) if label not in shown]
    if absent and needs_all_classes and not findings.errors:
        findings.warnings.append(
            f"{len(absent)} of {len(classes)} classes are not in {sample} masks: {named(absent)}. "
            f"Values and their share: {listed}"
        )


def count_values(path: Path) -> dict[int, int] | str:
    """Returns value -> number of pixels of a mask, or what is wrong with it."""
    try:
        with Image.open(path) as image:
            mask = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"cannot be read: {error}. Replace it"
    if mask.ndim != 2:
        return f"has {mask.shape[-1]} channels. A mask has one, with the value of each pixel's class"
    if mask.dtype.kind == "f":
        return "holds fractions. A mask holds whole numbers"
    values, numbers = np.unique(mask.astype(np.int64), return_counts=True)
    return dict(zip(values.tolist(), numbers.tolist(), strict=True))
