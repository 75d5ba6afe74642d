"""Data sets of Hugging Face's `datasets` on the local disk, `datasets:FOLDER[,split=SPLIT][,image=COLUMN][,label=COLUMN]`.

FOLDER was written by `save_to_disk`, or holds parquet files with images (the layout of data sets on the Hub). The former is
mapped where it is. The latter is copied once to Arrow files in the cache folder, because a parquet file has no random access.
Nothing is downloaded.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_et.data.decoding import BadImageError, Decoding, decode_image, read_file
from mae_et.data.sources.cache import cache_folder
from mae_et.data.sources.listing import NO_LABEL, LeftOut, PackedNames, narrow, nearest_folder, some_of
from mae_et.data.sources.table import parse_options
from mae_et.data.sources.table_listing import encode_labels
from mae_et.errors import DataError, printable

log = logging.getLogger(__name__)

PREFIX = "datasets:"
_STORED_TYPES = ("binary", "large_binary", "string", "large_string")  # content or path of an image's file
_LABEL_TYPES = re.compile(r"ClassLabel|bool|u?int\d+|float\d+|(large_)?string")
GRAMMAR = "datasets:FOLDER[,split=SPLIT][,image=COLUMN][,label=COLUMN]"


class HuggingFaceSource:
    """One split of a data set of Hugging Face.

    The images are the only column of type Image, the labels the only column of type ClassLabel, unless columns are named.

    Args:
        folder: of the data set.
        split: None: the only one.
        image: column of the images.
        label: column of the labels: ClassLabel, numbers or names.
        decoding: how the images are decoded.
    Raises:
        DataError: if there is no such data set, split or column, or labels are faulty.
    """

    labels: Sequence[int] | np.ndarray | None
    class_names: Sequence[str] | None
    why_no_labels = ""

    def __init__(
        self,
        folder: str | Path,
        split: str | None = None,
        image: str | None = None,
        label: str | None = None,
        decoding: Decoding = Decoding(),  # noqa: B008
    ) -> None:
        self.folder, self.decoding, self.left_out = Path(folder), decoding, LeftOut()
        self._shown = printable(str(folder))
        self.how_to_label = f"name a column with labels: {GRAMMAR}"
        rows = _open(self.folder, split)
        image = image or self._only_image_column(rows)
        self._check_column(rows, image, "image")
        if label is not None:
            self._check_column(rows, label, "label")
            if not _LABEL_TYPES.fullmatch(_type(rows.features[label])):
                raise DataError(f"{self._shown}: column {label!r} holds no labels; name another: {_described(rows)}")
        self._column, self._rows = image, rows.select_columns([image])
        kind = _type(rows.features[image])
        if kind == "Image":
            import datasets

            self._rows = self._rows.cast_column(image, datasets.Image(decode=False))
        elif kind != "dict" and kind not in _STORED_TYPES:
            raise DataError(
                f"{self._shown}: column {image!r} of type {kind} holds no images; name another: {_described(rows)}"
            )
        self._paths = _paths(rows.data.column(image))
        self.labels, self.class_names = self._read_labels(rows, label)

    def _only_image_column(self, rows: Any) -> str:
        found = [name for name, feature in rows.features.items() if _type(feature) == "Image"]
        if len(found) != 1:
            raise DataError(
                f"{self._shown} has {len(found)} columns of type Image; name the column, as {PREFIX}{self._shown},image=COLUMN; "
                f"it has {_described(rows)}"
            )
        return found[0]

    def _check_column(self, rows: Any, name: str, option: str) -> None:
        if name not in rows.features:
            near = difflib.get_close_matches(name, rows.features, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise DataError(f"{self._shown} has no column {option}={name}{hint}; it has {_described(rows)}")

    def _read_labels(self, rows: Any, label: str | None) -> tuple[np.ndarray | None, list[str] | None]:
        if label is None:
            found = [name for name, feature in rows.features.items() if _type(feature) == "ClassLabel"]
            if len(found) != 1:
                what = (
                    f"{len(found)} columns of type ClassLabel ({some_of(found)})"
                    if found
                    else "no column of type ClassLabel"
                )
                self.why_no_labels = f"it has {what}"
                return None, None
            label = found[0]
        names = getattr(rows.features[label], "names", None)
        values = rows.data.column(label).to_pylist()
        if names:  # -1: not known, as in many test splits
            values = [None if value == NO_LABEL else value for value in values]
        where = f"column {label!r} of {self._shown}"
        labels, own_names = encode_labels(values, "row {}".format, where)
        unlabelled = np.flatnonzero(labels == NO_LABEL)
        if len(unlabelled):
            self.why_no_labels = (
                f"{len(unlabelled)} of {len(labels)} rows have none in column {label!r}, e.g. row {unlabelled[0]}"
            )
            return None, None
        if names and (highest := int(labels.max())) >= len(names):
            raise DataError(f"{where} has the label {highest}, but {len(names)} classes; repair the data set")
        return labels, [printable(name) for name in names or own_names or ()] or None

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return printable(f"{self.folder}/{self.key(index)}")

    def key(self, index: int) -> str:
        path = self._paths[index]
        return f"{index}:{path}" if path else str(index)

    def size(self, index: int) -> None:
        return None

    def read(self, index: int) -> bytes:
        try:
            value = self._rows[index][self._column]
        except (OSError, ValueError) as error:
            raise BadImageError(f"the row cannot be read: {error}") from error
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise BadImageError("the row holds no image")
        return value if isinstance(value, bytes) else read_file(os.path.join(self.folder, value))

    def load(self, index: int) -> Image.Image:
        return decode_image(self.read(index), *self.decoding)


def _type(feature: Any) -> str:
    return type(feature).__name__ if type(feature).__name__ != "Value" else feature.dtype


def _described(rows: Any) -> str:
    return ", ".join(f"{name!r} ({_type(feature)})" for name, feature in list(rows.features.items())[:10])


def _paths(column: Any) -> PackedNames:
    """Returns the path of each image, "" where there is none, without reading the images."""
    kind = str(column.type)
    if kind.startswith("struct") and column.type.get_field_index("path") >= 0:
        paths = [path for chunk in column.chunks for path in chunk.field("path").to_pylist()]
    else:
        paths = column.to_pylist() if "string" in kind else [None] * len(column)
    parts = [os.fsencode(path or "") for path in paths]
    return PackedNames(
        np.frombuffer(b"".join(parts), np.uint8), narrow(np.cumsum([len(part) for part in parts], dtype=np.int64))
    )


def _open(folder: Path, split: str | None) -> Any:
    """Returns a split as a `datasets.Dataset`."""
    shown = printable(str(folder))
    if not os.path.isdir(folder):
        raise DataError(f"{shown} is not a folder; {nearest_folder(folder)}")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{PREFIX}{shown} cannot be read without datasets ({error}): pip install 'mae_et[datasets]'"
        ) from error
    is_saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    datasets.disable_progress_bars()
    try:
        if is_saved:
            opened = datasets.load_from_disk(str(folder))
        else:
            cache = cache_folder() / "datasets"
            log.info("%s is read from a copy in %s, which is made once", shown, cache)
            opened = datasets.load_dataset(str(folder.resolve()), cache_dir=str(cache))
    # Files that are missing, cut off or of another kind lead to any of these.
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise DataError(
            f"{shown} cannot be read as a data set of Hugging Face: {printable(reason)}; name a folder that save_to_disk wrote, "
            "or one with parquet files of images"
        ) from error
    if not isinstance(opened, datasets.DatasetDict):
        if split is not None and split != str(opened.split):
            raise DataError(f"{shown} holds a single split; remove split={printable(split)}")
        return opened
    if split is None and len(opened) == 1:
        return next(iter(opened.values()))
    if split not in opened:
        asked = f"no split {printable(split)}; it has" if split else "the splits"
        raise DataError(
            f"{shown} has {asked} {', '.join(opened)}: name one, as {PREFIX}{shown},split={next(iter(opened))}"
        )
    return opened[split]


def parse_datasets(spec: str, decoding: Decoding) -> HuggingFaceSource:
    """Opens what `datasets:FOLDER[,split=SPLIT][,image=COLUMN][,label=COLUMN]` names; raises DataError for other options."""
    match = re.fullmatch(r"(.+?)((?:,\w+=[^,]*)*)", spec[len(PREFIX) :], re.DOTALL)
    grammar = f"{printable(spec)} is written {GRAMMAR}"
    if match is None:
        raise DataError(f"{grammar}: the folder is missing")
    options = parse_options(match[2], ("split", "image", "label"), grammar)
    folder = os.path.expanduser(match[1])
    return HuggingFaceSource(folder, options.get("split"), options.get("image"), options.get("label"), decoding)
