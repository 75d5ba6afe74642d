"""Lists of class names that fix the order of the labels: a text file, or a list of ImageNet that timm ships."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from timm.data import ImageNetInfo

from mae_et.data.sources.generated import SceneSource
from mae_et.data.sources.listing import NO_LABEL, read_class_names, some_of
from mae_et.data.sources.source import ImageSource, parts_of
from mae_et.data.sources.torchvision_sets import TorchvisionSource
from mae_et.errors import DataError, printable

log = logging.getLogger(__name__)

TIMM_LISTS = (
    "imagenet-1k",
    "imagenet-12k",
    "imagenet-22k",
    "imagenet-22k-ms",
    "imagenet-21k-goog",
    "imagenet-21k-miil",
)


def class_list(spec: str) -> list[str]:
    """Returns the class names of a list, in its order.

    Args:
        spec: a text file with one name per line, or one of `TIMM_LISTS`. A file of that name comes first.
    Raises:
        DataError: if there is no such list, or it holds a name twice or an empty line.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        names = read_class_names(path)
    elif spec.lower() in TIMM_LISTS:
        names = ImageNetInfo(spec).label_names()
    else:
        raise DataError(
            f"data.classes = {printable(spec)!r} is neither a text file nor a list of timm: write one class name per line "
            f"into a file and name it, or choose one of {', '.join(TIMM_LISTS)}"
        )
    if doubles := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(
            f"data.classes = {printable(spec)!r} holds {len(doubles)} names more than once: {some_of(doubles)}; a class has one "
            "index, so remove the repetitions"
        )
    return names


def number_classes(source: ImageSource, names: Sequence[str], spec: str, where: str) -> None:
    """Numbers the classes of a source in the order of a list, in place.

    A class of the list without images keeps its number, and is logged. Shards without a classes.txt have no names: their
    labels are the numbers of the list already.

    Args:
        source: has labels.
        names: of the list.
        spec: of the list, for messages.
        where: "data.train" or "data.val", for messages.
    Raises:
        DataError: if the source has classes that the list does not have, or labels out of its range, or numbers its
            classes itself, as generated scenes and the data sets of torchvision do.
    """
    if any(isinstance(part, SceneSource | TorchvisionSource) for part in parts_of(source)):
        raise DataError(
            f"data.classes = {printable(spec)!r} numbers the classes of folders, tables and shards, but {where} numbers its own: "
            "set data.classes=None"
        )
    labels = np.asarray(source.labels)
    used = np.unique(labels)
    if source.class_names is not None:
        places = {name: number for number, name in enumerate(names)}
        if extra := [source.class_names[i] for i in used if source.class_names[i] not in places]:
            raise DataError(
                f"{where} has {len(extra)} classes that data.classes = {printable(spec)!r} does not list: {some_of(extra)}; move "
                "these folders away, or name the list of your release"
            )
        labels = np.array([places.get(name, NO_LABEL) for name in source.class_names])[labels]
        used = np.unique(labels)
    elif used[-1] >= len(names):
        raise DataError(
            f"{where} has class index {used[-1]}, but data.classes = {printable(spec)!r} lists {len(names)} classes, numbered "
            "from 0: name the list of your release, or correct the labels"
        )
    numbered = cast(Any, source)  # the protocol only promises to read them
    numbered.labels, numbered.class_names = labels.astype(np.int32), list(names)
    if len(used) < len(names):
        missing = [names[i] for i in np.setdiff1d(np.arange(len(names)), used)]
        log.warning(
            "%s has no image of %d of the %d classes of data.classes = %r; they keep their numbers: %s",
            where, len(missing), len(names), spec, some_of(missing),
        )  # fmt: skip
