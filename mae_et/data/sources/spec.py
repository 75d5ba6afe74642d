"""Where images come from: a folder, WebDataset tar shards, torchvision's data sets, or generated scenes.

`open_source` reads the user's words:

    /data/images                          a folder of images, any depth
    /data/train                           with a subfolder for each class: labelled, as torchvision's ImageFolder
    /data/train-000000.tar                one shard (.tar, .tar.gz, .tgz)
    /data/train-{000000..000004}.tar.gz   many shards: braces, or a glob such as /data/train-*.tar
    torchvision:NAME@ROOT[,split=SPLIT]   cifar10, cifar100, flowers102, oxford_iiit_pet or food101, already downloaded to
                                          torchvision's ROOT; see torchvision_sets.py
    scenes:NUM[@SIZE][,seed=S][,first=I]  the generated scenes I (0) to I+NUM-1 of seed S (0), SIZE px (H or HxW; 96)

Of one seed, sets of scenes that do not overlap have none in common: `scenes:2000@96,seed=1` to train and
`scenes:500@96,seed=1,first=10000000` to validate.

Every source is copied into each loader process, so what grows with the number of images is kept in flat buffers: a list
of a million Python strings is some 100 MB, and since merely reading a string writes its reference count, each forked
process would come to own a copy.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from mae_et.data.sources.folder import FolderSource
from mae_et.data.sources.generated import parse_scenes
from mae_et.data.sources.listing import nearest_folder
from mae_et.data.sources.shards import SHARD_SUFFIXES, ShardSource, is_shard_name
from mae_et.data.sources.source import ImageSource
from mae_et.data.sources.torchvision_sets import PREFIX, parse_torchvision
from mae_et.errors import DataError

logger = logging.getLogger(__name__)


def open_source(spec: str, num_channels: int = 3, need_labels: bool = False) -> ImageSource:
    """Opens the images that `spec` names; the module's docstring has the grammar.

    Args:
        spec: a folder, a shard, a brace or glob pattern of shards, one of torchvision's data sets, or a generated set.
        num_channels: 3 (RGB) or 1 (grey).
        need_labels: if true, a source without labels is an error that says why there are none.
    Raises:
        DataError: if there is nothing there, nothing usable, or no labels where they are needed.
        ValueError: if num_channels is neither 1 nor 3.
    """
    if num_channels not in (1, 3):
        raise ValueError(f"num_channels is {num_channels}: images are read as 3 (RGB) or 1 (grey); set one of these")
    spec = os.path.expanduser(os.fspath(spec).strip())
    if not spec:
        raise DataError(
            "no data given; name a folder of images, a pattern of tar shards, torchvision:NAME@ROOT or scenes:NUM"
        )
    if spec.startswith("scenes:"):
        return parse_scenes(spec, num_channels)
    if spec.startswith(PREFIX):
        return parse_torchvision(spec, num_channels)
    path = Path(spec)
    source: FolderSource | ShardSource
    if path.is_dir():
        source = FolderSource(path, num_channels)
    elif "://" in spec or spec.startswith("pipe:"):
        raise DataError(f"{spec} is a stream; images are read in random order, so download it and name the local path")
    elif is_shard_name(spec) or any(character in spec for character in "{*?["):
        source = ShardSource(spec, num_channels)
    elif path.exists():
        raise DataError(f"{spec} is neither a folder nor a tar shard ({', '.join(SHARD_SUFFIXES)}); name one of these")
    else:
        raise DataError(f"{spec} does not exist; {nearest_folder(path)}")
    if need_labels and source.labels is None:
        raise DataError(f"{spec} has no labels, which are needed here: {source.why_no_labels}")
    return source


def check_same_classes(train: ImageSource, val: ImageSource) -> None:
    """Makes sure that two labelled sources number the same classes.

    Raises:
        DataError: naming the classes that only one of them has.
    """
    if not train.class_names or not val.class_names or list(train.class_names) == list(val.class_names):
        return
    only_train = sorted(set(train.class_names) - set(val.class_names))
    only_val = sorted(set(val.class_names) - set(train.class_names))
    if not only_train and not only_val:
        raise DataError("data.train and data.val number the same classes in another order: mend one's classes.txt")
    raise DataError(
        f"data.train and data.val have different classes: only in train: {some_of(only_train)}; "
        f"only in val: {some_of(only_val)}. Labels are numbered by the sorted names, so both need the same"
    )


def some_of(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
