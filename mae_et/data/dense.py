"""Images with masks for the dense probe: files of class values, or COCO instances.

Shapes: H, W px of an image, C channels, S x T px of the network's input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from mae_et.config.dense_probe import DenseDataConfig
from mae_et.data.decoding import BadImageError, decode_image, orientation
from mae_et.data.mask_files import IGNORED, pair_files, read_classes
from mae_et.data.sources.listing import some_of
from mae_et.data.stream import init_worker
from mae_et.errors import DataError
from mae_et.models.sizes import Size

IGNORE = -1  # label of a pixel that nothing counts
MAX_CLASSES = 2**15 - 1


@dataclass(frozen=True)
class MaskFile:
    """A mask as an image with one channel."""

    path: Path
    labels: Mapping[int, int]  # value -> label, IGNORED for unlabelled

    def read(self) -> np.ndarray:
        """Returns [H, W] int16 labels.

        Raises:
            BadImageError: if the file cannot be read.
            DataError: if it has several channels or a value that the class list lacks.
        """
        try:
            with Image.open(self.path) as image:
                values = np.asarray(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BadImageError(f"mask {self.path} cannot be read: {type(error).__name__}") from error
        if values.ndim != 2:
            raise DataError(
                f"{self.path} has {values.shape[2]} channels, but a mask has one, with the value of the class: convert the masks"
            )
        values = values.astype(np.int64)
        table = np.full(257, IGNORE - 1, np.int16)
        for value, label in self.labels.items():
            table[value] = IGNORE if label == IGNORED else label
        found = table[np.where((values < 0) | (values > 255), 256, values)]
        wrong = found < IGNORE
        if wrong.any():
            raise DataError(
                f"{self.path} has the value {values[wrong][0]}, which the class list lacks. Add it to a class or to 'ignore'"
            )
        return found


@dataclass(frozen=True)
class CocoMask:
    """The instances of one image. Smaller ones lie over larger ones; pixels of crowds alone are ignored."""

    where: str  # for messages
    size: tuple[int, int]  # H, W
    objects: tuple[tuple[int, bool, float, Any], ...]  # label, is crowd, area, segmentation

    def read(self) -> np.ndarray:
        """Returns [H, W] int16 labels. Raises DataError if a segmentation cannot be drawn."""
        try:
            from pycocotools import mask as coco
        except ImportError as error:
            raise DataError("COCO instances need pycocotools: pip install pycocotools") from error
        found = np.zeros(self.size, np.int16)
        for label, is_crowd, _, shape in sorted(self.objects, key=lambda one: (not one[1], -one[2])):
            try:
                if isinstance(shape, dict) and not isinstance(shape["counts"], list):
                    code = shape
                else:
                    code = coco.frPyObjects(shape, *self.size)
                inside = coco.decode(coco.merge(code) if isinstance(code, list) else code).astype(bool)
                found[inside] = IGNORE if is_crowd else label
            except (TypeError, ValueError, KeyError, IndexError) as error:
                raise DataError(
                    f"{self.where}: a segmentation cannot be drawn ({type(error).__name__}: {error}). Correct the annotations"
                ) from error
        return found


class Pair(NamedTuple):
    """An image and its mask."""

    image: Path
    mask: MaskFile | CocoMask


@dataclass(frozen=True)
class DenseSplit:
    """The images of a split that have a mask."""

    pairs: Sequence[Pair]
    class_names: tuple[str, ...]
    counts: Mapping[str, int]  # what is left out, by name


def open_split(data: DenseDataConfig, split: str) -> DenseSplit:
    """Pairs the images of a split with their masks.

    Args:
        data: where they are.
        split: "train" or "val".
    Raises:
        DataError: if there are none, or classes or annotations cannot be read.
    """
    root = Path(data.root).expanduser()
    images, masks = (root / getattr(data, f"{split}_{what}") for what in ("images", "masks"))
    for what, path in (("root", root), (f"{split}_images", images), (f"{split}_masks", masks)):
        if not path.exists():
            raise DataError(f"no such file or folder: {path}. Set data.{what}")
    found = _coco(images, masks) if masks.suffix == ".json" else _files(images, masks, root / data.classes)
    if not found.pairs:
        raise DataError(
            f"no image of {images} has a mask in {masks}: a mask has the stem of its image, e.g. street/1.jpg and street/1.png"
        )
    return found


def _files(images: Path, masks: Path, classes_path: Path) -> DenseSplit:
    classes, found = read_classes(classes_path), pair_files(images, masks)
    counts = {
        "images_without_a_mask": len(found.lonely_images),
        "masks_without_an_image": len(found.lonely_masks),
    }
    pairs = [Pair(image, MaskFile(mask, classes.labels)) for image, mask in found.files]
    return DenseSplit(pairs, classes.names, counts)


def _coco(images: Path, path: Path) -> DenseSplit:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        categories = sorted(content["categories"], key=lambda one: one["id"])
        labels = {one["id"]: label for label, one in enumerate(categories, 1)}
        objects: dict[Any, list[Any]] = {one["id"]: [] for one in content["images"]}
        for one in content["annotations"]:
            shape = (labels[one["category_id"]], bool(one.get("iscrowd", 0)), float(one["area"]), one["segmentation"])
            objects[one["image_id"]].append(shape)
        rows = [
            (str(one["file_name"]), (int(one["height"]), int(one["width"])), one["id"]) for one in content["images"]
        ]
        names = ("background", *(str(one["name"]) for one in categories))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is not a file of COCO instances ({type(error).__name__}: {error}): it needs images, categories and "
            "annotations with segmentations"
        ) from error
    if len(names) > MAX_CLASSES:
        raise DataError(f"{path} has {len(names)} classes; the limit is {MAX_CLASSES}")
    present = [row for row in rows if (images / row[0]).is_file()]
    pairs = [
        Pair(images / name, CocoMask(f"{path}, image {name}", size, tuple(objects[number])))
        for name, size, number in sorted(present)
    ]
    return DenseSplit(pairs, names, {"annotated_images_without_a_file": len(rows) - len(present)})


class Sample(NamedTuple):
    """One image of a split; `reason` says why it cannot be read, and then the tensors are empty."""

    number: int  # of the image
    image: Tensor  # [C, S, T] uint8
    labels: Tensor  # [H, W] int16, IGNORE where there is none
    reason: str = ""


class _Samples(Dataset[Sample]):
    def __init__(self, pairs: Sequence[Pair], image_size: Size, num_channels: int) -> None:
        self.pairs, self.image_size, self.num_channels = pairs, image_size, num_channels

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        try:
            image, labels = decode_image(pair.image, self.num_channels), pair.mask.read()
        except BadImageError as error:
            return Sample(index, torch.empty(0), torch.empty(0), f"{pair.image}: {error}")
        if labels.shape != (image.height, image.width):
            raise DataError(size_fault(pair.image, (image.height, image.width), labels.shape))
        resized = F.resize(image, list(self.image_size), InterpolationMode.BICUBIC)
        return Sample(index, F.pil_to_tensor(resized), torch.from_numpy(labels))


def size_fault(name: Path | str, image: tuple[int, int], mask: tuple[int, ...]) -> str:
    """Returns a message for a mask whose size is not that of its image; sizes are (H, W)."""
    return (
        f"{name} is {image[0]} x {image[1]} px (H x W), its mask {mask[0]} x {mask[1]} px: each pixel needs its label. "
        "Resize the masks without interpolation, or pair the right files"
    )


def check_sizes(pairs: Sequence[Pair]) -> None:
    """Compares the sizes of images and masks by their headers; unreadable files are left to the loader.

    Raises:
        DataError: with the number of masks of another size, and the first ones.
    """
    faults, first = [], ""
    for pair in pairs:
        try:
            sizes = [
                _size(pair.image, upright=True),
                pair.mask.size if isinstance(pair.mask, CocoMask) else _size(pair.mask.path, upright=False),
            ]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        if sizes[0] != sizes[1]:
            first = first or size_fault(pair.image, *sizes)
            faults.append(str(pair.image))
    if faults:
        raise DataError(
            f"{len(faults)} of {len(pairs)} masks have another size than their image: {some_of(faults)}. {first}"
        )


def _size(path: Path, upright: bool) -> tuple[int, int]:
    """Returns H and W of an image file; `upright`: as its EXIF orientation shows it, which masks do not follow."""
    with Image.open(path) as image:
        swaps = upright and orientation(image) in (5, 6, 7, 8)
        return (image.width, image.height) if swaps else (image.height, image.width)


def dense_loader(
    pairs: Sequence[Pair], image_size: Size, num_channels: int, batch_size: int, num_workers: int
) -> DataLoader[Any]:
    """Returns a loader of lists of samples, in order. Images are resized to S x T px; masks keep their size."""
    return DataLoader(
        _Samples(pairs, image_size, num_channels), batch_size, num_workers=num_workers, collate_fn=list,
        worker_init_fn=init_worker if num_workers else None, generator=torch.Generator(),
    )  # fmt: skip
