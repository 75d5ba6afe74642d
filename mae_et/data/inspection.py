"""Inspects image data before a run: file names, and a stated sample of headers and pixels."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from mae_et.data.arrays import examine
from mae_et.data.decoding import BadImageError, ImageFacts
from mae_et.data.overlap import MAX_COMPARED, MAX_NAMES, evenly_spread, find_overlap
from mae_et.data.pixel_format import PixelFormat
from mae_et.data.sources.folder import FolderSource
from mae_et.data.sources.listing import some_of
from mae_et.data.sources.shards import ShardSource
from mae_et.data.sources.source import ImageSource, as_regions, parts_of, read_ahead
from mae_et.data.sources.spec import check_same_classes
from mae_et.data.sources.table import TableSource
from mae_et.errors import DataError
from mae_et.models.sizes import Size, as_size

log = logging.getLogger(__name__)

Severity = Literal["error", "warning", "count"]
NUM_SAMPLED = 256
_ENLARGED_WARNING = 0.1  # share of images
_DARK = 1 / 8  # of the white value: a set whose brightest value is below this has another range
_FEW_VALUES = 64  # of a label map

_SPLITS = re.compile(r"(train(ing|val)?|val(id|idation)?|test(ing)?|dev|minival|unlabell?ed)[-_]?\d*", re.IGNORECASE)
_IMAGES = re.compile(r"(images?|imgs?|img_dir|jpegimages|photos?|pictures?|rgb)[-_]?\d*", re.IGNORECASE)
_MASKS = re.compile(
    r"((seg(mentation)?_?)?(masks?|labels?|annotations?|ann_dir|anns?)|gt|ground_?truths?|seg(mentation)?s?"
    r"|segmentation(class|object)(raw)?|label_?maps?|trimaps?|gt_?fine|stuffthingmaps)[-_]?\d*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Finding:
    """One result of an inspection."""

    severity: Severity
    kind: str
    text: str
    fix: str = ""
    is_logged: bool = False  # the source logged it when it was opened


@dataclass
class Findings:
    """All results of an inspection."""

    items: list[Finding] = field(default_factory=list)

    def add(self, severity: Severity, kind: str, text: str, fix: str = "", is_logged: bool = False) -> None:
        self.items.append(Finding(severity, kind, text, fix, is_logged))

    def to_dict(self) -> dict[str, list[dict[str, str]]]:
        """Returns the findings for summary.json: severity -> list of kind, text and fix."""
        rows: dict[str, list[dict[str, str]]] = {"error": [], "warning": [], "count": []}
        for item in self.items:
            values = asdict(item)
            rows[item.severity].append({key: values[key] for key in ("kind", "text", "fix")})
        return rows

    def log(self) -> None:
        """Logs warnings and counts, except those that were logged when the source was opened."""
        for item in self.items:
            if not item.is_logged and item.severity != "error":
                level = logging.WARNING if item.severity == "warning" else logging.INFO
                log.log(level, "%s", f"{item.text}; {item.fix}" if item.fix else item.text)

    def raise_errors(self) -> None:
        """Raises one DataError with all errors, if there are any."""
        errors = [
            f"{item.text}; {item.fix}" if item.fix else item.text for item in self.items if item.severity == "error"
        ]
        if len(errors) == 1:
            raise DataError(errors[0])
        if errors:
            raise DataError(f"the data has {len(errors)} errors\n" + "\n".join(f"  - {error}" for error in errors))


def inspect_images(
    train: ImageSource,
    val: ImageSource | None = None,
    image_size: int | Size | None = None,
    num_sampled: int = NUM_SAMPLED,
) -> Findings:
    """Inspects the images of a run.

    The names of all folders of a `FolderSource` are read, and of up to `MAX_NAMES` images of other sources. Headers and, for
    images of one band, pixels are read for at most `num_sampled` images of each source. All samples are evenly spread, and
    each text states their number.

    Args:
        train: training images, or the only images.
        val: validation images.
        image_size: final size of the run, px, side or (H, W); None: enlargement is not looked at.
        num_sampled: limit for the images of each source that are read.
    Returns:
        The findings.
    """
    findings = Findings()
    sources = [("data.train", train)] if val is not None else [("images", train)]
    if val is not None:
        sources.append(("data.val", val))
    for name, source in sources:
        _inspect_names(findings, name, source)
        _inspect_sample(findings, name, source, image_size, num_sampled)
    if val is not None:
        try:
            check_same_classes(train, val)
        except DataError as error:
            findings.add("error", "class_maps", str(error))
        _inspect_overlap(findings, train, val, num_sampled)
    return findings


def _inspect_names(findings: Findings, name: str, source: ImageSource) -> None:
    for reason, group in source.left_out:
        text = f"{name}: left out {group.count} {reason}, e.g. {', '.join(group.examples)}"
        fix = "convert them to a kind that is read, for example PNG, if they are images" if group.is_loss else ""
        findings.add("warning" if group.is_loss else "count", "left_out", text, fix, is_logged=True)
    for part in parts_of(source):
        if isinstance(part, ShardSource) and part.num_dotted:
            findings.add("warning", "dotted_names", f"{name}: {part.dotted_text()}", is_logged=True)
        if isinstance(part, TableSource) and part.num_repeated:
            findings.add("warning", "repeated_paths", f"{name}: {part.repeated_text()}", is_logged=True)
    classes = list(source.class_names or ())
    if not classes:
        return
    if source.labels is not None:
        empty = np.flatnonzero(np.bincount(np.asarray(source.labels), minlength=len(classes)) == 0)
        if len(empty):
            text = (
                f"{name}: {len(empty)} of {len(classes)} classes have no image: {some_of([classes[i] for i in empty])}"
            )
            findings.add("count", "empty_classes", text, is_logged=True)
    special = [folder for folder in classes if any(p.fullmatch(folder) for p in (_SPLITS, _IMAGES, _MASKS))]
    if len(special) == len(classes) or len(special) > 1:
        findings.add(
            "warning",
            "splits_as_classes",
            f"{name}: the folders {some_of(special)} are taken for classes, but look like splits or kinds of data",
            "name one of them as the data, for example its train folder",
        )
    same: dict[str, list[str]] = {}
    for folder in classes:
        same.setdefault(unicodedata.normalize("NFKC", folder).casefold().strip(), []).append(folder)
    if doubles := [" = ".join(map(repr, group)) for group in same.values() if len(group) > 1]:
        findings.add(
            "warning",
            "duplicate_classes",
            f"{name}: {len(doubles)} class names occur more than once, or differ only in case or encoding: {some_of(doubles)}",
            "merge these folders, or rename one",
        )


def _inspect_sample(
    findings: Findings, name: str, source: ImageSource, image_size: int | Size | None, num_sampled: int
) -> None:
    facts: dict[int, ImageFacts] = {}
    bad: list[str] = []
    indices = evenly_spread(len(source), num_sampled)
    read_ahead(source, indices)
    for index in indices:
        try:
            content = source.read(index)
            if content is None:  # generated scenes, CIFAR and raw shards have no files: upright, scaled already
                image = source.load(index)
                channels = source.decoding.num_channels if source.decoding.num_channels > 1 else 3  # grey may be colour
                fact = ImageFacts(image.width, image.height, 1, PixelFormat(channels, 8))
                if as_regions(source) is None:
                    facts = dict.fromkeys(indices, fact)
                    break
                facts[index] = fact
                continue
            facts[index] = examine(content, source.decoding)
        except BadImageError as error:
            bad.append(f"{source.name(index)} ({error})")
    of = f"of {len(indices)} sampled images" if len(indices) < len(source) else f"of {len(source)} images"
    if bad:
        findings.add(
            "warning",
            "unreadable",
            f"{name}: {len(bad)} {of} cannot be read: {some_of(bad)}",
            "repair or remove them; `mae-et stats` lists all",
        )

    _inspect_channels(findings, name, of, source, facts)

    def count(severity: Severity, kind: str, what: str, test: Callable[[ImageFacts], Any], fix: str = "") -> None:
        hits = [index for index, fact in facts.items() if test(fact)]
        if hits:
            findings.add(severity, kind, f"{name}: {len(hits)} {of} {what}, e.g. {source.name(hits[0])}", fix)

    count("count", "orientation", "are turned upright by their EXIF orientation", lambda fact: fact.orientation != 1)
    count(
        "warning", "bands", "have bands beyond their colour, which are not read", lambda fact: fact.stored.num_dropped_bands,
        "export the bands that you want as three (RGB) or one",
    )  # fmt: skip
    count(
        "warning", "bands", "have a fourth band without an ExtraSamples tag, and are refused",
        lambda fact: fact.stored.fourth_band_undeclared, "write that tag, or export three bands",
    )  # fmt: skip
    count(
        "count", "deep_colour", "have colour of more than 8 bits, of which the highest 8 are read",
        lambda fact: source.decoding.is_picture and fact.stored.is_deep and fact.stored.num_bands > 1,
        "convert them to 8 bits where their values do not fill the range",
    )  # fmt: skip
    _inspect_values(findings, name, of, source, facts)
    _inspect_masks(findings, name, of, source, facts)
    if image_size is not None and facts:
        height, width = as_size(image_size)
        small = [index for index, fact in facts.items() if fact.height < height or fact.width < width]
        what = f"a shorter side below {height} px" if height == width else f"fewer than {height} x {width} px"
        share = len(small) / len(facts)
        count(
            "warning" if share > _ENLARGED_WARNING else "count",
            "enlarged",
            f"({share:.0%}) have {what} and are enlarged to the final size",
            lambda fact: fact.height < height or fact.width < width,
            "set a smaller data.image_size, or use larger images",
        )


def _inspect_channels(
    findings: Findings, name: str, of: str, source: ImageSource, facts: Mapping[int, ImageFacts]
) -> None:
    """Reports images that are refused because their number of bands is not that of the run."""
    wanted = source.decoding.num_channels
    others = {
        index: fact.stored.num_bands
        for index, fact in facts.items()
        if fact.stored.num_bands != wanted and (fact.needs_range or wanted not in (1, 3))
        if not {fact.stored.num_bands, wanted} <= {1, 3}
    }
    if not others:
        return
    counts = [f"{count} with {bands}" for bands, count in sorted(Counter(others.values()).items())]
    findings.add(
        "error" if len(others) == len(facts) else "warning",
        "channels",
        f"{name}: {len(others)} {of} have other bands than model.in_chans = {wanted} and are refused: {some_of(counts)}, e.g. "
        f"{some_of([source.name(index) for index in others])}",
        "set model.in_chans to the number of bands, or export the same bands of all images",
    )


def _inspect_values(
    findings: Findings, name: str, of: str, source: ImageSource, sampled: Mapping[int, ImageFacts]
) -> None:
    """Compares the stored values of images that are not 8-bit with the range that is read as black to white."""
    value_range, facts = source.decoding.value_range, sampled.values()
    deep = [fact for fact in facts if fact.lowest is not None and fact.stored.is_deep]
    if value_range is not None and (shallow := [i for i, fact in sampled.items() if not fact.stored.is_deep]):
        text = f"{name}: data.value_range = {value_range} has no effect on {len(shallow)} {of}, which are 8-bit"
        if len(shallow) < len(sampled):
            findings.add("count", "value_range", f"{text}, e.g. {source.name(shallow[0])}")
        else:
            findings.add(
                "warning", "value_range", text, "remove that setting: 8-bit images take a quarter of the memory"
            )
    if not deep:
        return
    lowest = min(fact.lowest for fact in deep if fact.lowest is not None)
    highest = max(fact.highest for fact in deep if fact.highest is not None)
    formats = Counter(str(fact.stored) for fact in deep)
    text = f"{name}: {len(deep)} {of} have {some_of(list(formats))}, from {lowest:g} to {highest:g}"
    top = 2 ** max(1, int(highest)).bit_length() - 1
    wanted = f"set data.value_range=({min(0.0, lowest):.10g}, {top})"
    if value_range is not None:
        clipped = sum(fact.lowest < value_range[0] or fact.highest > value_range[1] for fact in deep)  # type: ignore[operator]
        if clipped:
            text += f"; {clipped} of them have values outside data.value_range = {value_range}, which are clipped"
        findings.add("count", "value_range", text)
        return
    whites = [fact.stored.white for fact in deep]
    if lowest < 0 or any(fact.needs_range or fact.stored.white is None for fact in deep):
        severity: Severity = (
            "error" if len(deep) == len(facts) and all(fact.needs_range for fact in deep) else "warning"
        )
        findings.add(severity, "value_range", f"{text}; they have no defined black and white and are refused", wanted)
    elif highest <= _DARK * min(white for white in whites if white is not None):
        text += f"; white is {min(white for white in whites if white is not None):g}, so the images are nearly black"
        findings.add("warning", "value_range", text, wanted)
    else:
        findings.add("count", "value_range", text)


def _inspect_masks(findings: Findings, name: str, of: str, source: ImageSource, facts: dict[int, ImageFacts]) -> None:
    """Warns of label maps among images: by the names of the folders, and by the values of the sample."""
    folders: Counter[str] = Counter()
    counts, num_named = _folder_counts(source)
    for path, count in counts.items():
        # In a shard, what stands before the colon is the path of the shard.
        if named := next(filter(_MASKS.fullmatch, path.rpartition(":")[2].split("/")), None):
            folders[named] += count
    fix = "name only the folder with the images as the data"
    if folders and sum(folders.values()) < num_named:
        listed = some_of([f"{folder} ({count} images)" for folder, count in folders.items()])
        if num_named < len(source):
            listed += f", of {num_named} sampled names of {len(source)}"
        findings.add(
            "warning", "masks", f"{name}: folders that look like label maps lie among the images: {listed}", fix
        )
        return
    maps = [index for index, fact in facts.items() if fact.num_values is not None and fact.num_values <= _FEW_VALUES]
    if maps and len(maps) < len(facts):
        findings.add(
            "warning",
            "masks",
            f"{name}: {len(maps)} {of} have one band with at most {_FEW_VALUES} values, as label maps have, e.g. "
            f"{source.name(maps[0])}",
            fix,
        )


def _folder_counts(source: ImageSource) -> tuple[dict[str, int], int]:
    """Returns the number of images of each folder, and of how many images the names were read."""
    if isinstance(source, FolderSource):
        return dict(source.folders()), len(source)
    named = evenly_spread(len(source), MAX_NAMES)
    return Counter(source.key(index).rpartition("/")[0] for index in named), len(named)


def _inspect_overlap(findings: Findings, train: ImageSource, val: ImageSource, num_sampled: int) -> None:
    overlap = find_overlap(train, val, num_sampled)
    parts: list[str] = []
    if overlap.num_same_paths:
        parts = [f"{overlap.num_same_paths} of {len(val)} validation images are also training images"]
        if overlap.num_paths < len(train):
            parts[0] += f" (by the paths of {overlap.num_paths} of {len(train)} training images)"
    if overlap.num_same_contents:
        compared = f"{overlap.num_sampled} sampled validation images"
        if overlap.num_compared < overlap.num_candidates:
            compared += f", compared with {MAX_COMPARED} of {overlap.num_candidates} training images of equal size,"
        if overlap.num_sized < len(train):
            compared += f" with the file sizes of {overlap.num_sized} of {len(train)} training images,"
        parts = [*parts, f"{overlap.num_same_contents} of {compared} have the content of a training image"]
    if parts:
        findings.add(
            "warning",
            "overlap",
            f"data.val and data.train overlap: {'; '.join(parts)}, e.g. {overlap.examples[0]}",
            "accuracy on images that were trained on is too high; separate the sets",
        )
