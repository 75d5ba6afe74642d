"""torchvision's classification data sets by name, `torchvision:NAME@ROOT[,split=SPLIT]`. Read from disk, never downloaded.

    NAME             SPLIT (the first is the default)   folder in ROOT
    cifar10          train, test                        cifar-10-batches-py
    cifar100         train, test                        cifar-100-python (the 100 fine classes)
    flowers102       train, val, trainval, test         flowers-102 (reading it needs scipy)
    oxford_iiit_pet  trainval, test                     oxford-iiit-pet (the 37 breeds)
    food101          train, test                        food-101

ROOT is the root that torchvision's classes take. The splits are torchvision's; trainval of flowers102 is its train and val.
Images that are files are decoded like those of a folder; the 32 px images of CIFAR are kept in memory.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_et.data.arrays import ImageArray, decode
from mae_et.data.decoding import Decoding, file_size, read_file
from mae_et.data.sources.listing import LeftOut, PackedNames
from mae_et.errors import DataError, printable

PREFIX = "torchvision:"
GRAMMAR = "torchvision:NAME@ROOT[,split=SPLIT], e.g. torchvision:cifar10@data,split=test"


@dataclass(frozen=True)
class _Known:
    class_name: str  # in torchvision.datasets
    folder: str  # below ROOT
    splits: tuple[str, ...]  # the default first
    files: str = ""  # attribute with the images' paths; empty: pixels in memory
    labels: str = "targets"  # attribute


SETS = {
    "cifar10": _Known("CIFAR10", "cifar-10-batches-py", ("train", "test")),
    "cifar100": _Known("CIFAR100", "cifar-100-python", ("train", "test")),
    "flowers102": _Known("Flowers102", "flowers-102", ("train", "val", "trainval", "test"), "_image_files", "_labels"),
    "oxford_iiit_pet": _Known("OxfordIIITPet", "oxford-iiit-pet", ("trainval", "test"), "_images", "_labels"),
    "food101": _Known("Food101", "food-101", ("train", "test"), "_image_files", "_labels"),
}


class TorchvisionSource:
    """One split of one of torchvision's data sets; the docstring of the module lists them.

    Args:
        set_name: e.g. "cifar10".
        root: torchvision's root: the folder that holds the data set's own folder.
        split: None: the first in the list.
        decoding: how the images are decoded.
    Raises:
        DataError: if there is no such data set or split, or it is incomplete on disk.
    """

    labels: Sequence[int]
    class_names: Sequence[str] | None

    def __init__(
        self,
        set_name: str,
        root: str | Path,
        split: str | None = None,
        decoding: Decoding = Decoding(),  # noqa: B008
    ) -> None:
        if set_name not in SETS:
            raise DataError(f"{PREFIX}{printable(set_name)} is not a known data set; known are {', '.join(SETS)}")
        known = SETS[set_name]
        self.set_name, self.root = set_name, Path(root).expanduser()
        self.decoding, self.left_out = decoding, LeftOut()
        self.split = known.splits[0] if split is None else split
        if self.split not in known.splits:
            raise DataError(f"{set_name} has no split {self.split!r}; it has {', '.join(known.splits)}")
        parts = [_open(set_name, self.root, part) for part in _parts(set_name, self.split)]
        self.labels = array("q", (int(label) for part in parts for label in getattr(part, known.labels)))
        self.class_names = [str(name) for name in parts[0].classes] if hasattr(parts[0], "classes") else None
        self._pixels: np.ndarray | None = None
        self._names: PackedNames | None = None
        if known.files:
            # torchvision's lists of Path objects would be copied into each loader process; see spec.py.
            paths = [os.fsencode(path.relative_to(self.root)) for part in parts for path in getattr(part, known.files)]
            self._names = PackedNames(
                np.frombuffer(b"".join(paths), np.uint8), np.cumsum([len(path) for path in paths], dtype=np.int64)
            )
        else:
            self._pixels = parts[0].data  # [M, 32, 32, 3] uint8
            self.decoding = decoding._replace(dtype="uint8")
        if not self.labels:
            raise DataError(f"{self.root / known.folder} lists no {self.split} images; {_remedy(set_name, self.root)}")

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return printable(self.key(index) if self._names is None else f"{self.root}/{self._names[index]}")

    def key(self, index: int) -> str:
        return f"{self.set_name} {self.split} image {index}" if self._names is None else self._names[index]

    def size(self, index: int) -> int | None:
        return None if self._names is None else file_size(f"{self.root}/{self._names[index]}")

    def read(self, index: int) -> bytes | None:
        return None if self._names is None else read_file(f"{self.root}/{self._names[index]}")

    def load(self, index: int) -> Image.Image | ImageArray:
        if (content := self.read(index)) is not None:
            return decode(content, self.decoding)
        assert self._pixels is not None
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        image = Image.fromarray(self._pixels[index])
        return image if self.decoding.num_channels == 3 else image.convert("L")


def parse_torchvision(spec: str, decoding: Decoding = Decoding()) -> TorchvisionSource:  # noqa: B008
    """Opens what `torchvision:NAME@ROOT[,split=SPLIT]` names.

    Raises:
        DataError: as TorchvisionSource, and for another grammar.
    """
    match = re.fullmatch(r"torchvision:([^@]+)@(.+?)(?:,split=([^,]*))?", spec)
    if match is None:
        raise DataError(f"{printable(spec)} cannot be read; a data set of torchvision is written {GRAMMAR}")
    return TorchvisionSource(match[1], match[2], match[3], decoding)


def _parts(set_name: str, split: str) -> tuple[str, ...]:
    return ("train", "val") if (set_name, split) == ("flowers102", "trainval") else (split,)


def _open(set_name: str, root: Path, split: str) -> Any:
    from torchvision import datasets  # a slow import that other sources do not need

    known = SETS[set_name]
    which = {"train": split == "train"} if set_name.startswith("cifar") else {"split": split}
    try:
        return getattr(datasets, known.class_name)(str(root), **which, download=False)
    except ModuleNotFoundError as error:
        raise DataError(f"{set_name} cannot be read without {error.name}: pip install {error.name}") from error
    # A broken list of images leads torchvision's reader to any of these.
    except (RuntimeError, OSError, EOFError, ValueError, LookupError) as error:
        state = "does not exist"
        if (root / known.folder).exists():
            # torchvision's own RuntimeError has no detail, and recommends download=True.
            detail = (
                "" if isinstance(error, RuntimeError) else f" ({(str(error).splitlines() or ['it ends early'])[0]})"
            )
            state = f"is incomplete or damaged{detail}"
        hint = f"; ROOT is the folder above {known.folder}" if root.name == known.folder else ""
        raise DataError(f"{root / known.folder} {state}{hint}; {_remedy(set_name, root)}") from error


def _remedy(set_name: str, root: Path) -> str:
    known = SETS[set_name]
    return (
        "nothing is downloaded here; download it once: "
        f'python -c "from torchvision.datasets import {known.class_name}; '
        f'{known.class_name}({str(root)!r}, download=True)"'
    )
