"""Opens the images that a user names: folders, lists, tables, shards, data sets of other libraries, or generated scenes.

The grammar of `open_source`:

    /data/images                          a folder of images, any depth; .npy and DICOM files count where there are no others
    /data/train                           with a subfolder for each class: labelled, as torchvision's ImageFolder
    /data/train.txt[,root=FOLDER]         a path in each line, with or without a label; see table.py
    /data/train.csv[,path=COLUMN,...]     a table with paths and labels, also .tsv and .parquet; see table.py
    /data/train-000000.tar                one shard (.tar, .tar.gz, .tgz)
    /data/train-{000000..000004}.tar.gz   many shards: braces, or a glob such as /data/train-*.tar
    /data/train.raw.json                  pixels, the set `train` of raw shards in /data; see raw.py
    s3://bucket/train-{000..099}.tar      shards on a server: s3, http, https or another protocol of fsspec; not compressed
    file:///data/images                   as /data/images
    datasets:FOLDER[,split=SPLIT]         a data set of Hugging Face on the local disk; see hugging_face.py
    torchvision:NAME@ROOT[,split=SPLIT]   cifar10, cifar100, flowers102, oxford_iiit_pet or food101, already downloaded to
                                          torchvision's ROOT; see torchvision_sets.py
    scenes:NUM[@SIZE][,seed=S][,first=I]  the generated scenes I (0) to I+NUM-1 of seed S (0), SIZE px (H or HxW; 96)
    [A, B]                                several of these as one; quote an item that holds a comma; see several.py

Sets of scenes of one seed that do not overlap have no scene in common: `scenes:2000@96,seed=1` for training and
`scenes:500@96,seed=1,first=10000000` for validation.

Every source is copied into each loader process, so what grows with the number of images is kept in flat buffers that are
mapped from a file (see `folder_listing.py` and `shard_index.py`): a list of a million Python strings takes about 100 MB, and
reading a string writes its reference count, so each forked process would end up with a copy.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Literal

from mae_et.config.data import DataConfig
from mae_et.config.source_list import is_list, split_sources
from mae_et.data.decoding import MAX_IMAGE_PIXELS, Decoding
from mae_et.data.sources import hugging_face, torchvision_sets
from mae_et.data.sources.folder import FolderSource
from mae_et.data.sources.generated import parse_scenes
from mae_et.data.sources.listing import nearest_folder, some_of
from mae_et.data.sources.raw import RAW_SUFFIX, RawSource
from mae_et.data.sources.remote import is_remote
from mae_et.data.sources.remote_shards import RemoteShardSource
from mae_et.data.sources.several import join
from mae_et.data.sources.shard_names import SHARD_SUFFIXES, is_shard_name
from mae_et.data.sources.shards import MAX_SHARDS, MAX_UNPACK_RATIO, ShardSource
from mae_et.data.sources.source import ImageSource
from mae_et.data.sources.table import TABLE_SUFFIXES, TableSource, is_table, parse_table
from mae_et.errors import DataError, printable

log = logging.getLogger(__name__)

REMOTE_CACHE_GIB = 100.0


def open_source(
    spec: str,
    num_channels: int = 3,
    need_labels: bool = False,
    *,
    value_range: tuple[float, float] | None = None,
    dtype: Literal["uint8", "float32"] | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    max_shards: int = MAX_SHARDS,
    max_unpack_ratio: float = MAX_UNPACK_RATIO,
    remote_cache_gib: float = REMOTE_CACHE_GIB,
) -> ImageSource:
    """Opens the images that `spec` names; the docstring of the module has the grammar.

    What is left out is logged: as a warning where images may be among it, otherwise as information.

    Args:
        spec: one source, or a list of sources.
        num_channels: 3 (RGB), 1 (grey), or the number of bands of the images.
        need_labels: if true, a source without labels is an error that says why there are none.
        value_range: stored values (black, white) of images that are not 8-bit.
        dtype: of the images; None: float32 with a value range, otherwise uint8.
        max_image_pixels: larger images count as unreadable.
        max_shards: limit for the number of shards that a pattern names.
        max_unpack_ratio: limit for the size of a gzip shard's content over its own.
        remote_cache_gib: limit for what is kept of remote shards in the cache folder, GiB of all remote data sets together.
    Raises:
        DataError: if there is nothing there, nothing usable, or no labels where they are needed.
        ValueError: if num_channels, value_range or max_image_pixels is out of range.
    """
    decoding = Decoding(
        num_channels, value_range, max_image_pixels, dtype or ("uint8" if value_range is None else "float32")
    )
    decoding.check()
    spec = os.fspath(spec).strip()
    if not spec:
        raise DataError(
            "no data given; name a folder of images, a list file, a pattern of tar shards, torchvision:NAME@ROOT or scenes:NUM"
        )
    if "\0" in spec:
        raise DataError(f"{printable(spec)} holds a null character, which no path can hold; correct it")
    specs, shown = split_sources(spec), printable(spec)
    if not specs or any(map(is_list, specs)):
        raise DataError(f"{shown} is no list of sources; write [A, B], with the names of folders or other sources")
    if repeated := [one for one, count in Counter(specs).items() if count > 1]:
        raise DataError(
            f"{shown} lists {printable(repeated[0])} twice; name it once, with a weight in data.train_weights"
        )
    sources = [_open_one(one, decoding, max_shards, max_unpack_ratio, remote_cache_gib) for one in specs]
    source = sources[0] if not is_list(spec) else join(sources, specs)
    if need_labels and source.labels is None:
        why, how = (getattr(source, key) for key in ("why_no_labels", "how_to_label"))
        raise DataError(f"{shown} has no labels, which are needed here: {why}; {how}")
    return source


def _open_one(
    spec: str, decoding: Decoding, max_shards: int, max_unpack_ratio: float, remote_cache_gib: float
) -> ImageSource:
    """Opens one source; arguments and errors as for `open_source`."""
    spec = os.path.expanduser(spec)
    if decoding.num_channels not in (1, 3) and spec.startswith(("scenes:", torchvision_sets.PREFIX)):
        raise DataError(
            f"{printable(spec)} has RGB or grey images; set model.in_chans to 3 or 1, not {decoding.num_channels}"
        )
    if spec.startswith("scenes:"):
        return parse_scenes(spec, decoding.num_channels)
    if spec.startswith(torchvision_sets.PREFIX):
        return torchvision_sets.parse_torchvision(spec, decoding)
    if spec.startswith(hugging_face.PREFIX):
        return hugging_face.parse_datasets(spec, decoding)
    if spec.lower().startswith("file://"):
        spec = spec[len("file://") :]
    path, shown = Path(spec), printable(spec)
    source: FolderSource | TableSource | ShardSource | RawSource
    # os.path, because pathlib raises for a name that is too long.
    if os.path.isdir(spec):
        source = FolderSource(path, decoding)
    elif spec.startswith("pipe:"):
        raise DataError(
            f"{shown} is a stream, but images are read in random order; download it and name the local path"
        )
    elif is_remote(spec):
        source = RemoteShardSource(spec, decoding, max_shards, int(remote_cache_gib * 2**30))
    elif is_table(spec):
        source = parse_table(spec, decoding)
    elif spec.endswith(RAW_SUFFIX) and os.path.exists(spec):
        source = RawSource(path, decoding)
    elif is_shard_name(spec) or any(character in spec for character in "{*?["):
        source = ShardSource(spec, decoding, max_shards, max_unpack_ratio)
    elif os.path.exists(spec):
        raise DataError(
            f"{shown} is neither a folder nor a list file or table ({', '.join(TABLE_SUFFIXES)}) nor a tar shard"
            f" ({', '.join(SHARD_SUFFIXES)}) nor the header of raw shards ({RAW_SUFFIX}); name one of these"
        )
    else:
        raise DataError(f"{shown} does not exist; {nearest_folder(path)}")
    if losses := source.left_out.describe(only_losses=True):
        log.warning("%s: left out, although they may be images: %s", shown, losses)
    elif len(source.left_out):
        log.info("%s: left out: %s", shown, source.left_out.describe())
    return source


def open_images(data: DataConfig, spec: str, num_channels: int, need_labels: bool = False) -> ImageSource:
    """Opens the images of a config with its limits and value range; see `open_source`.

    Args:
        data: of the config.
        spec: data.train or data.val.
        num_channels: model.in_chans.
        need_labels: if true, a source without labels is an error.
    """
    return open_source(
        spec,
        num_channels,
        need_labels,
        value_range=data.value_range,
        max_image_pixels=data.max_image_pixels,
        max_shards=data.max_shards,
        max_unpack_ratio=data.max_unpack_ratio,
        remote_cache_gib=data.remote_cache_gib,
    )


def check_same_classes(train: ImageSource, val: ImageSource) -> None:
    """Makes sure that two labelled sources number the same classes.

    Raises:
        DataError: if they differ, with the classes that only one of them has; or if only one of them names its classes.
    """
    if train.labels is None or val.labels is None:
        return
    if bool(train.class_names) != bool(val.class_names):
        named, other = ("data.train", "data.val") if train.class_names else ("data.val", "data.train")
        names = list(train.class_names or val.class_names or ())
        raise DataError(
            f"{named} names its classes and {other} only numbers them, so nobody knows whether number 0 "
            f"is {printable(names[0])!r}: add a classes.txt beside the shards or the list file of {other}, with the "
            f"name of class n in line n (from 0). In the order of {named} it reads: {some_of(names)}"
        )
    if list(train.class_names or ()) == list(val.class_names or ()):
        return
    only_train = sorted(set(train.class_names or ()) - set(val.class_names or ()))
    only_val = sorted(set(val.class_names or ()) - set(train.class_names or ()))
    if not only_train and not only_val:
        raise DataError("data.train and data.val number the same classes in another order; correct one's classes.txt")
    raise DataError(
        f"data.train and data.val have different classes: only in train: {some_of(only_train)}; "
        f"only in val: {some_of(only_val)}. Labels are numbered by the sorted names, so both need the same; for list files and "
        "tables, a classes.txt beside them lists all"
    )
