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
import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mae_et.data.images import IMAGE_EXTENSIONS, decode_image, read_file
from mae_et.data.listing import NO_LABEL, PackedNames, nearest_folder
from mae_et.data.shards import SHARD_SUFFIXES, ShardSource, is_shard_name
from mae_et.data.torchvision_sets import PREFIX, parse_torchvision
from mae_et.errors import DataError

logger = logging.getLogger(__name__)

_SCENES_GRAMMAR = "scenes:NUM[@SIZE][,seed=S][,first=I], e.g. scenes:2000@96,seed=1"


class ImageSource(Protocol):
    """Images by index. `labels` has one class index for each image, or is None; `class_names` may always be None."""

    @property
    def labels(self) -> Sequence[int] | None: ...

    @property
    def class_names(self) -> Sequence[str] | None: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call this image: its path, or `shard.tar:member`."""
        ...

    def read(self, index: int) -> bytes | None:
        """The content of the image's file, for `decode_image`, or None where there is no file. Errors as `load`."""
        ...

    def load(self, index: int) -> Image.Image:
        """The decoded image (mode RGB or L); raises BadImageError if it cannot be read."""
        ...


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
        return _parse_scenes(spec, num_channels)
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


class FolderSource:
    """Images below a folder, in the order of torchvision's ImageFolder.

    Hidden entries and `__MACOSX` are skipped. Links to folders are followed, except back into a folder they lie in; a
    link to a file that is gone counts as an image, and as a bad one when it is read, so that a data set that shrank is
    noticed. If every image lies below a first-level subfolder, these subfolders, sorted, are the classes (one that is
    empty keeps its number).
    """

    labels: Sequence[int] | None
    class_names: Sequence[str] | None
    why_no_labels = ""

    def __init__(self, root: str | Path, num_channels: int = 3) -> None:
        self.root = Path(root)
        self.num_channels = num_channels
        found, top_folders, others = _scan_folder(self.root)
        if not found:
            raise DataError(_nothing_found(self.root, others))
        class_of = {name: index for index, name in enumerate(top_folders)}
        blob, lengths, labels = bytearray(), array("q"), array("q")
        for folder in sorted(found, key=lambda folder: (folder.split("/")[0], folder)):
            prefix = os.fsencode(f"{folder}/") if folder else b""
            names = [prefix + name for name in found[folder].split(b"\0")]
            blob += b"".join(names)
            lengths.extend(map(len, names))
            labels.extend([class_of.get(folder.split("/")[0], NO_LABEL)] * len(names))
        self._names = PackedNames(bytes(blob), np.cumsum(lengths, dtype=np.int64))
        self.labels, self.class_names = labels, top_folders
        if "" in found:
            self.labels = self.class_names = None
            self.why_no_labels = (
                f"the classes are the first-level subfolders, but {labels.count(NO_LABEL)} images lie in the folder "
                f"itself, e.g. {self._names[0]}; move each into a subfolder named after its class"
            )
        elif empty := sorted(set(top_folders) - {folder.split("/")[0] for folder in found}):
            logger.warning("%s: %d class folders hold no image: %s", self.root, len(empty), ", ".join(empty[:10]))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.root}/{self._names[index]}"

    def read(self, index: int) -> bytes:
        return read_file(self.name(index))

    def load(self, index: int) -> Image.Image:
        return decode_image(self.read(index), self.num_channels)


class SceneSource:
    """Generated scenes, kept in memory after the first use (up to 1 GiB in each process, then made anew each time).

    Args:
        num_images: how many.
        image_size: px, (H, W) or the side of a square.
        seed: another seed is another set of scenes.
        num_channels: 3 (RGB) or 1 (grey).
        first: number of the first scene: sets of one seed that do not overlap have no scene in common.
    """

    def __init__(
        self, num_images: int, image_size: int | tuple[int, int], seed: int = 0, num_channels: int = 3, first: int = 0
    ) -> None:
        from mae_et.data.scenes import MIN_SIDE  # here and below: who reads files needs none of the painting

        if num_images < 1:
            raise DataError(f"{num_images} scenes asked for; ask for at least 1: {_SCENES_GRAMMAR}")
        self.num_images, self.seed, self.num_channels, self.first = num_images, seed, num_channels, first
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < MIN_SIDE:
            raise DataError(f"scenes of {height} x {width} px asked for; their sides are at least {MIN_SIDE} px")
        self.image_size = (height, width)
        self._labels: array[int] | None = None
        self._forget()

    def _forget(self) -> None:
        shape = (self.num_images, *self.image_size, 3)
        fits = int(np.prod(shape, dtype=np.int64)) <= 1 << 30
        self._pixels = np.zeros(shape, np.uint8) if fits else None  # the system hands out its pages on first use
        self._made = np.zeros(self.num_images, bool)

    @property
    def labels(self) -> Sequence[int]:
        from mae_et.data.scenes import scene_label

        if self._labels is None:
            numbers = range(self.first, self.first + self.num_images)
            self._labels = array("q", (scene_label(number, self.seed) for number in numbers))
        return self._labels

    @property
    def class_names(self) -> Sequence[str]:
        from mae_et.data.scenes import SCENE_CLASSES

        return list(SCENE_CLASSES)

    def __len__(self) -> int:
        return self.num_images

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_pixels", "_made")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def name(self, index: int) -> str:
        return f"scene {self.first + index} of seed {self.seed}"

    def read(self, index: int) -> None:
        return None

    def load(self, index: int) -> Image.Image:
        if not 0 <= index < self.num_images:
            raise IndexError(f"scene {index} of {self.num_images}")
        if self._pixels is not None and self._made[index]:
            pixels = self._pixels[index].copy()
        else:
            pixels = self._make(index)
        image = Image.fromarray(pixels)
        return image if self.num_channels == 3 else image.convert("L")

    def _make(self, index: int) -> np.ndarray:
        from mae_et.data.scenes import make_scene

        pixels = make_scene(self.first + index, image_size=self.image_size, seed=self.seed).image
        if self._pixels is not None:
            self._pixels[index] = pixels
            self._made[index] = True
        return pixels


def _parse_scenes(spec: str, num_channels: int) -> SceneSource:
    match = re.fullmatch(r"scenes:(\d+)(?:@(\d+)(?:x(\d+))?)?((?:,(?:seed|first)=\d+)*)", spec)
    if match is None:
        raise DataError(f"{spec} is not understood; a generated set is written {_SCENES_GRAMMAR}")
    height = int(match[2] or 96)
    options = {key: int(value) for key, value in re.findall(r",(\w+)=(\d+)", match[4])}
    return SceneSource(int(match[1]), (height, int(match[3] or height)), num_channels=num_channels, **options)


def _scan_folder(root: Path) -> tuple[dict[str, bytes], list[str], list[str]]:
    """Folder, relative to root -> its images' names joined by NUL; the first-level folders; the other files' paths."""
    found: dict[str, bytes] = {}
    top_folders: list[str] = []
    others: list[str] = []
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while waiting:
        folder, above = waiting.pop()
        images: list[bytes] = []
        try:
            status = os.stat(root / folder)
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                logger.warning("%s is a link back into a folder that holds it; not followed", root / folder)
                continue
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if _is_folder(entry):
                        waiting.append((path, (*above, identity)))
                        if not folder:
                            top_folders.append(entry.name)
                    elif entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in entry.name:
                        images.append(os.fsencode(entry.name))
                    else:
                        others.append(path)
        except OSError as error:
            raise DataError(f"{root / folder} cannot be read ({error.strerror}); mend that or move it away") from error
        if images:
            found[folder] = b"\0".join(sorted(images))
    return found, sorted(top_folders), others


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _nothing_found(root: Path, others: list[str]) -> str:
    shards = sorted(path for path in others if is_shard_name(path))
    if shards:
        patterns = _patterns_for(f"{root}/{path}" for path in shards)
        return f"{root} holds tar shards and no images; name the shards: {' or '.join(patterns)}"
    kinds = sorted({Path(path).suffix.lower() or "without extension" for path in others})
    inside = f"its {len(others)} files are of other kinds ({', '.join(kinds[:8])})" if others else "it has no files"
    return f"{root} holds no images ({', '.join(IMAGE_EXTENSIONS)}): {inside}; name the folder where the images are"


def _patterns_for(paths: Iterable[str]) -> list[str]:
    """The brace patterns that together name the given shards."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    singles: list[str] = []
    for path in paths:
        match = re.fullmatch(r"(.*?)(\d+)(\.tar|\.tar\.gz|\.tgz)", path, re.DOTALL)
        if match:
            groups.setdefault((match[1], match[3], len(match[2])), []).append(match[2])
        else:
            singles.append(path)
    for (prefix, suffix, _), numbers in groups.items():
        low, high = min(numbers), max(numbers)
        if len(numbers) == 1:
            singles.append(f"{prefix}{low}{suffix}")
        elif int(high) - int(low) + 1 == len(numbers):
            singles.append(f"{prefix}{{{low}..{high}}}{suffix}")
        else:
            singles.append(f"{prefix}*{suffix}")
    return sorted(singles)
